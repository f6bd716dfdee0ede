// Prints the addresses of a name as Go's own resolver finds them, and then "done".
package main

import (
	"context"
	"fmt"
	"net"
	"os"
)

func main() {
	resolver := net.Resolver{PreferGo: true}
	addresses, err := resolver.LookupIPAddr(context.Background(), os.Args[1])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	for _, address := range addresses {
		fmt.Println(address.IP)
	}
	fmt.Println("done")
}
