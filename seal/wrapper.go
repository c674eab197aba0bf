package seal

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/switchback-dr/switchback"
)

// keyFile wraps with AES-256-GCM under a key that a file holds.
type keyFile struct {
	path string
	aead cipher.AEAD
}

// KeyFile reads a wrapping key: 32 bytes, base64, in a file that only its owner
// may read. MakeKeyFile makes one.
func KeyFile(path string) (Wrapper, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "key file: %w", err).WithHint("put the key file in place, or make one with 'switchback key new %s'", path)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, switchback.Errorf(switchback.CodeRefused, "key file %s can be read by others (mode %v)", path, st.Mode().Perm()).WithHint("chmod 600 %s", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "key file: %w", err)
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
	if err != nil || len(key) != keySize {
		return nil, switchback.Errorf(switchback.CodeInvalid, "key file %s does not hold %d bytes in base64", path, keySize)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	return keyFile{path, aead}, err
}

// MakeKeyFile writes a new random key to a file that must not exist yet.
func MakeKeyFile(path string) error {
	key := make([]byte, keySize)
	rand.Read(key) // never fails
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return switchback.Errorf(switchback.CodeConflict, "%s exists", path).WithHint("a key that is in use must never be overwritten; choose another name")
	} else if err != nil {
		return err
	}
	_, err = f.WriteString(base64.StdEncoding.EncodeToString(key) + "\n")
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (k keyFile) Name() string { return "file:" + k.path }

func (k keyFile) Wrap(_ context.Context, key, bound []byte) ([]byte, error) {
	n := make([]byte, k.aead.NonceSize())
	rand.Read(n) // never fails
	return k.aead.Seal(n, n, key, bound), nil
}

func (k keyFile) Unwrap(_ context.Context, wrapped, bound []byte) ([]byte, error) {
	n := k.aead.NonceSize()
	if len(wrapped) < n {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "a wrapped key of %d bytes", len(wrapped))
	}
	key, err := k.aead.Open(nil, wrapped[:n], wrapped[n:], bound)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "key file %s does not unwrap the data key", k.path).WithHint("use the key file that wrapped it")
	}
	return key, nil
}

// commandLimit is how long a key command may take.
const commandLimit = 30 * time.Second

// command wraps through an external program.
type command struct{ argv []string }

// Command wraps by running a program, for example one that asks a key manager.
// It is run without a shell, once for each key, with a JSON object on its
// standard input,
//
//	{"operation": "wrap" or "unwrap", "data": base64, "bound": base64}
//
// and answers on its standard output with {"data": base64}. An exit status
// other than 0 is a refusal whose reason is its standard error. It must refuse to unwrap under another
// bound.
func Command(argv []string) (Wrapper, error) {
	if len(argv) == 0 || argv[0] == "" {
		return nil, switchback.Errorf(switchback.CodeInvalid, "the key command is empty")
	}
	return command{argv}, nil
}

func (c command) Name() string { return "command:" + c.argv[0] }

type request struct {
	Operation string `json:"operation"`
	Data      []byte `json:"data"`
	Bound     []byte `json:"bound"`
}

func (c command) Wrap(ctx context.Context, key, bound []byte) ([]byte, error) {
	return c.run(ctx, request{"wrap", key, bound})
}

func (c command) Unwrap(ctx context.Context, wrapped, bound []byte) ([]byte, error) {
	return c.run(ctx, request{"unwrap", wrapped, bound})
}

func (c command) run(ctx context.Context, req request) ([]byte, error) {
	in, err := json.Marshal(req)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.argv[0], c.argv[1:]...)
	cmd.WaitDelay = time.Second
	var out, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), &out, &stderr
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && ctx.Err() == nil {
			return nil, switchback.Errorf(switchback.CodeUnauthorized, "key command %s refuses to %s: %s", c.argv[0], req.Operation, strings.TrimSpace(stderr.String())).
				WithHint("see that it reaches its key manager and may use the key")
		}
		return nil, switchback.Errorf(switchback.CodeUnavailable, "key command %s: %w", c.argv[0], err).WithHint("see that it is installed and answers within %v", commandLimit)
	}
	var answer struct {
		Data []byte `json:"data"`
	}
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil || len(answer.Data) == 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "key command %s answered no data", c.argv[0]).WithHint(`it must print {"data": base64}`)
	}
	return answer.Data, nil
}

// Source says where the wrapping key is: one of the two is set.
type Source struct {
	File    string   `json:"file,omitempty"`
	Command []string `json:"command,omitempty"`
}

// Wrapper opens the source.
func (s Source) Wrapper() (Wrapper, error) {
	switch {
	case s.File != "" && len(s.Command) > 0:
		return nil, switchback.Errorf(switchback.CodeInvalid, "a key file and a key command").WithHint("name one of them")
	case s.File != "":
		return KeyFile(s.File)
	}
	return Command(s.Command)
}

// Equal reports whether both name the same key.
func (s Source) Equal(o Source) bool {
	return s.File == o.File && slices.Equal(s.Command, o.Command)
}
