// containers_reader pulls one zstd:chunked layer in parts, as podman does, with the library that podman does it with, and
// gives the layer back as a tar.
//
//	containers_reader BLOB ANNOTATIONS.json DIRECTORY
//
// DIRECTORY becomes a store (overlay driver: needs root). Prints one JSON object: the digest of the stream that the library
// computed from tar-split and staged files, the digest of the stream that its Diff makes of the stored layer, and the
// bytes of the blob that it asked for.
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
	drivers "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/archive"
	"go.podman.io/storage/pkg/chunked"
	"go.podman.io/storage/pkg/reexec"
	"go.podman.io/storage/types"
)

type blob struct {
	file    *os.File
	fetched int64
}

func (b *blob) GetBlobAt(parts []chunked.ImageSourceChunk) (chan io.ReadCloser, chan error, error) {
	streams := make(chan io.ReadCloser)
	errs := make(chan error)
	go func() {
		defer close(streams)
		defer close(errs)
		for _, part := range parts {
			b.fetched += int64(part.Length)
			streams <- io.NopCloser(io.NewSectionReader(b.file, int64(part.Offset), int64(part.Length)))
		}
	}()
	return streams, errs, nil
}

func run() error {
	file, err := os.Open(os.Args[1])
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	text, err := os.ReadFile(os.Args[2])
	if err != nil {
		return err
	}
	annotations := map[string]string{}
	if err := json.Unmarshal(text, &annotations); err != nil {
		return err
	}
	blobDigest, err := digest.FromReader(file)
	if err != nil {
		return err
	}
	store, err := storage.GetStore(types.StoreOptions{
		RunRoot: filepath.Join(os.Args[3], "run"), GraphRoot: filepath.Join(os.Args[3], "graph"), GraphDriverName: "overlay",
		PullOptions: map[string]string{"enable_partial_images": "true"},
	})
	if err != nil {
		return fmt.Errorf("store: %w", err)
	}
	defer store.Shutdown(true)
	source := &blob{file: file}
	differ, err := chunked.NewDiffer(context.Background(), store, blobDigest, info.Size(), annotations, source)
	if err != nil {
		return fmt.Errorf("not readable in parts: %w", err)
	}
	defer differ.Close()
	output, err := store.PrepareStagedLayer(nil, differ)
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	result := map[string]any{"staged": output.UncompressedDigest, "size": output.Size, "fetched": source.fetched}
	layer, err := store.ApplyStagedLayer(storage.ApplyStagedLayerOptions{
		ID: "0123456789abcdef", DiffOutput: output, DiffOptions: &drivers.ApplyDiffWithDifferOpts{},
	})
	if err != nil {
		return fmt.Errorf("store the layer: %w", err)
	}
	uncompressed := archive.Uncompressed
	diff, err := store.Diff("", layer.ID, &storage.DiffOptions{Compression: &uncompressed})
	if err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, diff); err != nil {
		return fmt.Errorf("diff: %w", err)
	}
	diff.Close()
	result["diff"] = fmt.Sprintf("sha256:%x", hash.Sum(nil))
	names := []string{}
	for name := range output.BigData {
		names = append(names, name)
	}
	slices.Sort(names)
	result["kept"] = names
	return json.NewEncoder(os.Stdout).Encode(result)
}

func main() {
	if reexec.Init() {
		return
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "containers_reader:", err)
		os.Exit(1)
	}
}
