package objectstore_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore"
	"github.com/switchback-dr/switchback/objectstore/s3test"
)

func random(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

func put(t *testing.T, s *objectstore.Store, key string, content []byte) error {
	t.Helper()
	return s.Put(t.Context(), key, bytes.NewReader(content), int64(len(content)))
}

func want(t *testing.T, what string, err error, code switchback.Code) {
	t.Helper()
	if switchback.CodeOf(err) != code {
		t.Errorf("%s: %v, want code %q", what, err, code)
	}
}

func TestStore(t *testing.T) {
	srv := s3test.Start(t, "127.0.0.1")
	srv.MakeBucket("points", true)
	srv.MakeBucket("plain", false)
	open := func(bucket, prefix string) *objectstore.Store {
		s, err := objectstore.Open(srv.Config(bucket, prefix))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s, other := open("points", "site-b/p-1"), open("points", "site-b/p-10")
	f, err := s.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !f.Holds {
		t.Error("the bucket has object lock, Check does not say so")
	}

	t.Run("PutAndRead", func(t *testing.T) {
		for _, size := range []int{0, 1, (256 << 10), 3*(256<<10) + 5, 70 << 20} {
			content := random(size)
			key := "segments/" + string(rune('a'+size%7))
			if err := put(t, s, key, content); err != nil {
				t.Fatalf("%d bytes: %v", size, err)
			}
			o, err := s.Open(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			if o.Size() != int64(size) {
				t.Errorf("%d bytes: size is %d", size, o.Size())
			}
			got, err := io.ReadAll(io.NewSectionReader(o, 0, o.Size()+1))
			if err != nil || !bytes.Equal(got, content) {
				t.Errorf("%d bytes: read %d, %v", size, len(got), err)
			}
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(i), 1))
					for range 20 {
						if size < 100 {
							return
						}
						at := rng.IntN(size - 50)
						p := make([]byte, 50)
						if _, err := o.ReadAt(p, int64(at)); err != nil || !bytes.Equal(p, content[at:at+50]) {
							t.Errorf("read at %d: %v", at, err)
						}
					}
				})
			}
			wg.Wait()
			if err := s.Remove(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	})

	t.Run("NeverReplaced", func(t *testing.T) {
		if err := put(t, s, "once", []byte("first")); err != nil {
			t.Fatal(err)
		}
		if err := put(t, s, "once", []byte("first")); err != nil {
			t.Errorf("the same again: %v", err)
		}
		want(t, "another content", put(t, s, "once", []byte("other")), switchback.CodeConflict)
	})

	t.Run("ListAndRemove", func(t *testing.T) {
		if err := put(t, other, "segments/9", []byte("of another")); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"segments/1", "segments/2"} {
			if err := put(t, s, key, []byte(key)); err != nil {
				t.Fatal(err)
			}
		}
		list, err := s.List(t.Context(), "segments/")
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]objectstore.Info{{"segments/1", 10}, {"segments/2", 10}}, list); d != "" {
			t.Error(d)
		}
		for range 2 {
			if err := s.Remove(t.Context(), "segments/1"); err != nil {
				t.Error(err)
			}
		}
		_, err = s.Open(t.Context(), "segments/1")
		want(t, "what was removed", err, switchback.CodeNotFound)
	})

	t.Run("Held", func(t *testing.T) {
		if err := put(t, s, "locked", []byte("kept")); err != nil {
			t.Fatal(err)
		}
		if err := s.Hold(t.Context(), "locked", true); err != nil {
			t.Fatal(err)
		}
		want(t, "removing what is held", s.Remove(t.Context(), "locked"), switchback.CodeRefused)
		if o, err := s.Open(t.Context(), "locked"); err != nil || o.Size() != 4 {
			t.Errorf("it is gone: %v", err)
		}
		if err := s.Hold(t.Context(), "locked", false); err != nil {
			t.Fatal(err)
		}
		if err := s.Remove(t.Context(), "locked"); err != nil {
			t.Error(err)
		}
	})

	t.Run("WithoutLock", func(t *testing.T) {
		plain := open("plain", "")
		f, err := plain.Check(t.Context())
		if err != nil || f.Holds {
			t.Errorf("features %+v, %v", f, err)
		}
		if err := put(t, plain, "a", []byte("a")); err != nil {
			t.Fatal(err)
		}
		want(t, "hold", plain.Hold(t.Context(), "a", true), switchback.CodeUnsupported)
	})

	t.Run("NoBucket", func(t *testing.T) {
		none := open("missing", "")
		_, err = none.Check(t.Context())
		want(t, "check", err, switchback.CodeNotFound)
		want(t, "put", put(t, none, "a", nil), switchback.CodeNotFound)
	})

	t.Run("WrongSecret", func(t *testing.T) {
		cfg := srv.Config("points", "")
		cfg.CredentialsFile = filepath.Join(srv.Dir(), "wrong")
		if err := os.WriteFile(cfg.CredentialsFile, []byte(`{"access_key": "test", "secret_key": "no"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		thief, err := objectstore.Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		want(t, "put", put(t, thief, "a", nil), switchback.CodeUnauthorized)
	})

	t.Run("Down", func(t *testing.T) {
		content := random((256 << 10) + 1)
		if err := put(t, s, "far", content); err != nil {
			t.Fatal(err)
		}
		o, err := s.Open(t.Context(), "far")
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 10)
		if _, err := o.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		srv.Stop()
		if _, err := o.ReadAt(p, 5); err != nil {
			t.Errorf("what is cached: %v", err)
		}
		_, err = o.ReadAt(p[:1], (256 << 10))
		want(t, "read", err, switchback.CodeUnavailable)
		want(t, "put", put(t, s, "new", content), switchback.CodeUnavailable)
		srv.Start()
		if _, err := o.ReadAt(p[:1], (256 << 10)); err != nil || p[0] != content[(256<<10)] {
			t.Errorf("after it is back: %v", err)
		}
	})
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(content), mode), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good", `{"access_key": "a", "secret_key": "b"}`, 0o600)
	for _, c := range []struct {
		name string
		cfg  objectstore.Config
		code switchback.Code
	}{
		{name: "well", cfg: objectstore.Config{Endpoint: "https://s3.example", Bucket: "b", CredentialsFile: good}},
		{name: "no URL", cfg: objectstore.Config{Endpoint: "s3.example:9000", Bucket: "b", CredentialsFile: good}, code: switchback.CodeInvalid},
		{name: "no bucket", cfg: objectstore.Config{Endpoint: "https://s3.example", CredentialsFile: good}, code: switchback.CodeInvalid},
		{name: "no file", cfg: objectstore.Config{Endpoint: "https://s3.example", Bucket: "b", CredentialsFile: good + "x"}, code: switchback.CodeUnauthorized},
		{name: "open to all", cfg: objectstore.Config{Endpoint: "https://s3.example", Bucket: "b", CredentialsFile: file("open", "{}", 0o644)}, code: switchback.CodeRefused},
		{name: "no secret", cfg: objectstore.Config{Endpoint: "https://s3.example", Bucket: "b", CredentialsFile: file("empty", "{}", 0o600)}, code: switchback.CodeInvalid},
	} {
		_, err := objectstore.Open(c.cfg)
		want(t, c.name, err, c.code)
	}
}
