/* Prints the addresses of a name as c-ares finds them, and then "done". */
#include <ares.h>
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/select.h>

static void found(void *unused, int status, int timeouts, struct ares_addrinfo *all)
{
	char text[INET6_ADDRSTRLEN];

	if (status != ARES_SUCCESS) {
		fprintf(stderr, "%s\n", ares_strerror(status));
		return;
	}
	for (struct ares_addrinfo_node *next = all->nodes; next; next = next->ai_next) {
		const void *address =
			next->ai_family == AF_INET
				? (void *)&((struct sockaddr_in *)next->ai_addr)->sin_addr
				: (void *)&((struct sockaddr_in6 *)next->ai_addr)->sin6_addr;
		puts(inet_ntop(next->ai_family, address, text, sizeof(text)));
	}
	ares_freeaddrinfo(all);
}

int main(int argc, char **argv)
{
	struct ares_addrinfo_hints hints = {.ai_family = AF_UNSPEC};
	ares_channel channel;

	if (argc != 2 || ares_library_init(ARES_LIB_INIT_ALL) || ares_init(&channel))
		return 2;
	ares_getaddrinfo(channel, argv[1], NULL, &hints, found, NULL);
	for (;;) {
		struct timeval longest = {1, 0}, *wait;
		fd_set reads, writes;
		int count;

		FD_ZERO(&reads);
		FD_ZERO(&writes);
		count = ares_fds(channel, &reads, &writes);
		if (!count)
			break;
		wait = ares_timeout(channel, &longest, &longest);
		select(count, &reads, &writes, NULL, wait);
		ares_process(channel, &reads, &writes);
	}
	puts("done");
	return 0;
}
