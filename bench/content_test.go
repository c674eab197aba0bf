package main

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/s2"
)

func TestMixture(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	text := bytes.Repeat([]byte("real content "), 1000)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	read := func() []byte {
		list := []string{path, path}
		m := &mixture{rnd: rand.NewChaCha8([32]byte{2}), next: func() (string, bool) {
			if len(list) == 0 {
				return "", false
			}
			p := list[0]
			list = list[1:]
			return p, true
		}}
		defer m.close()
		b := make([]byte, 20<<20)
		if _, err := io.ReadFull(m, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	b := read()
	if !bytes.Equal(b, read()) {
		t.Error("the content is another one each time")
	}
	second := (len(text) + 4095) &^ 4095
	if !bytes.Equal(b[:len(text)], text) || !bytes.Equal(b[second:second+len(text)], text) {
		t.Error("files do not begin at whole blocks")
	}
	generated := b[8<<20 : 16<<20]
	if r := float64(len(s2.Encode(nil, generated))) / float64(len(generated)); r < 0.4 || r > 0.6 {
		t.Errorf("generated content shrinks to %.2f, want about half", r)
	}
}

func TestSizesFit(t *testing.T) {
	for _, quick := range []bool{false, true} {
		z := sizesOf(quick)
		runs := (z.content - z.files + runLength - 1) / runLength
		if end := int64(2<<30) + 64<<20 + z.content - z.files + runs*holeAfter; end > z.disk {
			t.Errorf("quick %v: content ends at %d, the disk at %d", quick, end, z.disk)
		}
		if z.files < z.check {
			t.Errorf("quick %v: %d bytes of files, %d are to be checked", quick, z.files, z.check)
		}
	}
	z := sizesOf(false)
	if z.disk < 8<<30 || z.content < 2560<<20 {
		t.Errorf("%+v: the issue asks for 8 GiB with 2.5 GiB of content", z)
	}
}

func TestBlocks(t *testing.T) {
	a := make([]byte, blockSize)
	b := bytes.Clone(a)
	b[17] = 1
	if hashBlock(a) != 0 || hashBlock(b) == 0 {
		t.Error("only zeros have hash 0")
	}
	if n := (blocks{0, 3, 5, 7}).differing(blocks{0, 3, 6, 8}); n != 2*blockSize {
		t.Errorf("%d bytes differ", n)
	}
}
