// containerd's conformance suite for snapshotters, against `p2pgz snapshotter` as containerd sees it: by gRPC.
//
// P2PGZ is the program, P2PGZ_CONTAINERD_SOCKETS a folder with a short name for the sockets.
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var count atomic.Int32

func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	state := filepath.Join(os.Getenv("P2PGZ_CONTAINERD_SOCKETS"), fmt.Sprint(count.Add(1)))
	socket := filepath.Join(state, "p2pgz.sock")
	command := exec.Command(os.Getenv("P2PGZ"), "snapshotter", "--state-dir", state, "--root", root)
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		return nil, nil, err
	}
	ended := func() error {
		_ = command.Process.Signal(syscall.SIGTERM)
		return command.Wait()
	}
	for try := 0; try < 600; try++ {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		_ = ended()
		return nil, nil, err
	}
	return proxy.NewSnapshotter(api.NewSnapshotsClient(conn), "p2pgz"), func() error {
		_ = conn.Close()
		return ended()
	}, nil
}

func TestConformance(t *testing.T) {
	// the kernel's overlays cannot rename directories of a lower layer: the suite knows that of "overlayfs"
	testsuite.SnapshotterSuite(t, "overlayfs", start)
}
