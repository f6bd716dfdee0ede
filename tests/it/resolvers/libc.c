/* Prints the addresses of a name as the C library finds them, and then "done". */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *next;
	char text[INET6_ADDRSTRLEN];
	int error;

	if (argc != 2)
		return 2;
	error = getaddrinfo(argv[1], NULL, &hints, &found);
	if (error) {
		fprintf(stderr, "%s\n", gai_strerror(error));
		puts("done");
		return 0;
	}
	for (next = found; next; next = next->ai_next) {
		const void *address =
			next->ai_family == AF_INET
				? (void *)&((struct sockaddr_in *)next->ai_addr)->sin_addr
				: (void *)&((struct sockaddr_in6 *)next->ai_addr)->sin6_addr;
		puts(inet_ntop(next->ai_family, address, text, sizeof(text)));
	}
	puts("done");
	return 0;
}
