package main

import (
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/lab/guest/manifest"
)

const mountPoint = "/mnt"

func (g *guest) mount(disk string) error {
	begin := time.Now()
	path, err := waitDevice(disk)
	if err != nil {
		return err
	}
	os.MkdirAll(mountPoint, 0o755)
	if err := syscall.Mount(path, mountPoint, "ext4", 0, ""); err != nil {
		return err
	}
	say("MOUNTED " + disk + " ms=" + dec(time.Since(begin).Milliseconds()))
	return nil
}

// check reads at least want bytes of the listed files, or all, and says whether
// they are what the builder wrote.
func (g *guest) check(want int64) (int64, error) {
	begin := time.Now()
	n, err := checkFiles(want)
	ms := dec(time.Since(begin).Milliseconds())
	if err != nil {
		say("CHECKED " + dec(n) + " BAD ms=" + ms + " error=" + err.Error())
	} else {
		say("CHECKED " + dec(n) + " ok ms=" + ms)
	}
	return n, err
}

func checkFiles(want int64) (int64, error) {
	text, err := os.ReadFile(mountPoint + "/" + manifest.Name)
	if err != nil {
		return 0, err
	}
	entries, err := manifest.Parse(string(text))
	if err != nil {
		return 0, err
	}
	var done int64
	buf := make([]byte, 1<<20)
	for _, e := range entries {
		if done >= want {
			break
		}
		f, err := os.Open(mountPoint + "/" + e.Path)
		if err != nil {
			return done, err
		}
		h := manifest.NewHash()
		var size int64
		for {
			n, err := io.ReadFull(f, buf)
			h.Write(buf[:n])
			size += int64(n)
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				break
			} else if err != nil {
				f.Close()
				return done, err
			}
		}
		f.Close()
		if size != e.Size || h.Sum() != e.Sum {
			return done, errors.New("wrong content of " + e.Path)
		}
		done += size
	}
	if done < want {
		return done, errors.New("only " + dec(done) + " bytes of files")
	}
	return done, nil
}

// dropCaches makes the next reads cold again.
func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}
