package seal

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"time"

	"github.com/switchback-dr/switchback"
)

// KeyID names a data key.
type KeyID [keyIDSize]byte

func (id KeyID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements encoding.TextMarshaler.
func (id KeyID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *KeyID) UnmarshalText(b []byte) error {
	raw, err := hex.DecodeString(string(b))
	if err != nil || len(raw) != keyIDSize {
		return switchback.Errorf(switchback.CodeInvalid, "%q is no key ID", b)
	}
	*id = KeyID(raw)
	return nil
}

// Wrapper protects data keys with a key of its own. bound is mixed into the
// wrapping: what was wrapped for one owner does not unwrap for another.
type Wrapper interface {
	// Name says which key wraps, for people; it is stored beside what it wrapped.
	Name() string
	Wrap(ctx context.Context, key, bound []byte) ([]byte, error)
	// Unwrap returns CodeUnauthorized when the key is not the one that wrapped.
	Unwrap(ctx context.Context, wrapped, bound []byte) ([]byte, error)
}

// WrappedKey is a data key as it is stored.
type WrappedKey struct {
	ID        KeyID     `json:"id"`
	Wrapped   []byte    `json:"wrapped"`
	Wrapper   string    `json:"wrapper"`
	CreatedAt time.Time `json:"created_at"`
}

// Keyring is the wrapped data keys of one owner; the last one seals new files.
// It holds nothing secret.
type Keyring struct {
	Owner string       `json:"owner"`
	Keys  []WrappedKey `json:"keys"`
}

// NewKeyring makes a key ring with one data key.
func NewKeyring(ctx context.Context, w Wrapper, owner string, now time.Time) (Keyring, error) {
	return Keyring{Owner: owner}.Rotate(ctx, w, now)
}

func (r Keyring) bound(id KeyID) []byte { return []byte(r.Owner + " " + id.String()) }

// Rotate returns the key ring with one more data key, which seals from now on.
// Files of the older keys stay as they are.
func (r Keyring) Rotate(ctx context.Context, w Wrapper, now time.Time) (Keyring, error) {
	var id KeyID
	key := make([]byte, keySize)
	rand.Read(id[:]) // never fails
	rand.Read(key)
	wrapped, err := w.Wrap(ctx, key, r.bound(id))
	if err != nil {
		return r, err
	}
	// What a wrapper cannot undo must not seal anything.
	back, err := w.Unwrap(ctx, wrapped, r.bound(id))
	if err != nil {
		return r, err
	}
	if !bytes.Equal(back, key) {
		return r, switchback.Errorf(switchback.CodeRefused, "%s does not unwrap what it wrapped", w.Name()).WithHint("correct the key command")
	}
	r.Keys = append(slices.Clone(r.Keys), WrappedKey{ID: id, Wrapped: wrapped, Wrapper: w.Name(), CreatedAt: now.UTC()})
	return r, nil
}

// Rewrap returns the key ring with every data key wrapped by next instead of w.
func (r Keyring) Rewrap(ctx context.Context, w, next Wrapper) (Keyring, error) {
	keys := slices.Clone(r.Keys)
	for i, k := range keys {
		key, err := w.Unwrap(ctx, k.Wrapped, r.bound(k.ID))
		if err != nil {
			return r, err
		}
		if keys[i].Wrapped, err = next.Wrap(ctx, key, r.bound(k.ID)); err != nil {
			return r, err
		}
		keys[i].Wrapper = next.Name()
	}
	return Keyring{Owner: r.Owner, Keys: keys}, nil
}

// Keys are the data keys of a key ring, unwrapped. They live in memory only.
type Keys struct {
	keys   map[KeyID][]byte
	newest KeyID
}

// Unwrap opens the key ring.
func (r Keyring) Unwrap(ctx context.Context, w Wrapper) (*Keys, error) {
	if len(r.Keys) == 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "the key ring of %s holds no key", r.Owner)
	}
	out := &Keys{keys: map[KeyID][]byte{}, newest: r.Keys[len(r.Keys)-1].ID}
	for _, k := range r.Keys {
		key, err := w.Unwrap(ctx, k.Wrapped, r.bound(k.ID))
		if err != nil {
			return nil, err
		}
		if len(key) != keySize {
			return nil, switchback.Errorf(switchback.CodeInvalid, "data key %v has %d bytes, want %d", k.ID, len(key), keySize)
		}
		out.keys[k.ID] = key
	}
	return out, nil
}
