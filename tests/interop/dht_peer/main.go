// A peer of another implementation: go-libp2p with go-libp2p-kad-dht, under p2pgz's protocol prefix.
//
//	dht_peer find  BOOTSTRAP CID     joins as a client, prints the providers of the CID, one "peer address" a line
//	dht_peer serve BOOTSTRAP CID     joins as a server, provides the CID, prints "ready ADDRESS", ends with its standard input
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/ipfs/go-cid"
	"github.com/libp2p/go-libp2p"
	dht "github.com/libp2p/go-libp2p-kad-dht"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/peer"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func join(ctx context.Context, bootstrap string, mode dht.ModeOpt) (host.Host, *dht.IpfsDHT) {
	h, err := libp2p.New(libp2p.ListenAddrStrings("/ip4/127.0.0.1/tcp/0"), libp2p.DisableRelay())
	check(err)
	d, err := dht.New(h, dht.Mode(mode), dht.ProtocolPrefix("/p2pgz"), dht.DisableValues())
	check(err)
	if bootstrap != "" {
		info, err := peer.AddrInfoFromString(bootstrap)
		check(err)
		check(h.Connect(ctx, *info))
	}
	check(d.Bootstrap(ctx))
	return h, d
}

func find(ctx context.Context, d *dht.IpfsDHT, c cid.Cid) {
	for range 50 { // the routing table fills when identify has run
		if d.RoutingTable().Size() > 0 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	for info := range d.FindProvidersAsync(ctx, c, 20) {
		fmt.Println(info.ID, info.Addrs)
	}
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := cid.Decode(os.Args[len(os.Args)-1])
	check(err)
	switch os.Args[1] {
	case "find":
		_, d := join(ctx, os.Args[2], dht.ModeClient)
		find(ctx, d, c)
	case "serve":
		h, d := join(ctx, os.Args[2], dht.ModeServer)
		for range 50 {
			if d.RoutingTable().Size() > 0 {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		check(d.Provide(ctx, c, true))
		fmt.Printf("ready %s/p2p/%s\n", h.Addrs()[0], h.ID())
		_, _ = io.Copy(io.Discard, os.Stdin)
	}
}
