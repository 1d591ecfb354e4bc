// estargz_reader lets the reference library judge a blob, and builds one to compare with.
//
//	estargz_reader verify BLOB TOC_DIGEST    open, verify the TOC, read and verify every chunk, print the tree as JSON lines
//	estargz_reader build LAYER OUT LEVEL CHUNK_BYTES
package main

import (
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	digest "github.com/opencontainers/go-digest"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type row struct {
	Name   string
	Type   string
	Mode   int64
	Size   int64
	Link   string
	Chunks int
	Digest string
}

func main() {
	if len(os.Args) < 4 {
		check(fmt.Errorf("usage: see the head of main.go"))
	}
	switch os.Args[1] {
	case "verify":
		verify(os.Args[2], digest.Digest(os.Args[3]))
	case "build":
		build(os.Args[2:])
	default:
		check(fmt.Errorf("unknown command %s", os.Args[1]))
	}
}

func open(name string) *io.SectionReader {
	file, err := os.Open(name)
	check(err)
	info, err := file.Stat()
	check(err)
	return io.NewSectionReader(file, 0, info.Size())
}

func verify(name string, toc digest.Digest) {
	reader, err := estargz.Open(open(name), estargz.WithDecompressors(new(estargz.GzipDecompressor), new(zstdchunked.Decompressor)))
	check(err)
	verifier, err := reader.VerifyTOC(toc)
	check(err)
	root, ok := reader.Lookup("")
	if !ok {
		check(fmt.Errorf("no root"))
	}
	out := json.NewEncoder(os.Stdout)
	walk(reader, verifier, out, "", root)
}

func walk(reader *estargz.Reader, verifier estargz.TOCEntryVerifier, out *json.Encoder, name string, entry *estargz.TOCEntry) {
	found := row{Name: name, Type: entry.Type, Mode: entry.Mode, Size: entry.Size, Link: entry.LinkName}
	if entry.Type == "reg" && entry.Size > 0 {
		file, err := reader.OpenFile(entry.Name)
		check(err)
		whole := digest.Canonical.Digester()
		for at := int64(0); at < entry.Size; {
			chunk, ok := reader.ChunkEntryForOffset(entry.Name, at)
			if !ok {
				check(fmt.Errorf("%s: no chunk at %d", name, at))
			}
			data := make([]byte, chunk.ChunkSize)
			_, err := file.ReadAt(data, at)
			check(err)
			v, err := verifier.Verifier(chunk)
			check(err)
			_, err = v.Write(data)
			check(err)
			if !v.Verified() {
				check(fmt.Errorf("%s: chunk at %d does not verify", name, at))
			}
			whole.Hash().Write(data)
			at += chunk.ChunkSize
			found.Chunks++
		}
		found.Digest = whole.Digest().String()
		if found.Digest != entry.Digest {
			check(fmt.Errorf("%s: digest is %s, TOC says %s", name, found.Digest, entry.Digest))
		}
	}
	check(out.Encode(found))
	entry.ForeachChild(func(base string, child *estargz.TOCEntry) bool {
		walk(reader, verifier, out, path.Join(name, base), child)
		return true
	})
}

func build(args []string) {
	level, err := strconv.Atoi(args[2])
	check(err)
	chunk, err := strconv.Atoi(args[3])
	check(err)
	if level < gzip.HuffmanOnly || level > gzip.BestCompression {
		check(fmt.Errorf("no such level"))
	}
	blob, err := estargz.Build(open(args[0]), estargz.WithCompressionLevel(level), estargz.WithChunkSize(chunk))
	check(err)
	out, err := os.Create(args[1])
	check(err)
	_, err = io.Copy(out, blob)
	check(err)
	check(out.Close())
	check(blob.Close())
	fmt.Println(blob.TOCDigest())
}
