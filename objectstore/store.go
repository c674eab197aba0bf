package objectstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/switchback-dr/switchback"
)

// Config names a place in a bucket. It holds no secret.
type Config struct {
	// Endpoint is the store's URL, http or https, without a path.
	Endpoint string `json:"endpoint"`
	Bucket   string `json:"bucket"`
	// Prefix comes before the name of every object; "" = none.
	Prefix string `json:"prefix,omitempty"`
	Region string `json:"region,omitempty"`
	// CredentialsFile holds {"access_key": …, "secret_key": …} and may be read
	// by its owner only.
	CredentialsFile string `json:"credentials_file"`
}

// Validate reports what cannot work.
func (c Config) Validate() error {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || strings.Trim(u.Path, "/") != "" {
		return switchback.Errorf(switchback.CodeInvalid, "object store: endpoint %q is no http or https URL of a server", c.Endpoint)
	}
	if c.Bucket == "" || c.CredentialsFile == "" {
		return switchback.Errorf(switchback.CodeInvalid, "object store: a bucket and a credentials file are needed")
	}
	return nil
}

// Store is a place in a bucket. Its methods may be called concurrently.
type Store struct {
	cfg    Config
	client *minio.Client
}

// answerLimit is how long the store may take to begin an answer.
const answerLimit = 30 * time.Second

// Open reads the credentials; it does not talk to the store. Check does.
func Open(cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	u, _ := url.Parse(cfg.Endpoint) // validated
	st, err := os.Stat(cfg.CredentialsFile)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "object store: %w", err).WithHint("put the credentials file in place")
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, switchback.Errorf(switchback.CodeRefused, "object store: %s can be read by others (mode %v)", cfg.CredentialsFile, st.Mode().Perm()).WithHint("chmod 600 %s", cfg.CredentialsFile)
	}
	b, err := os.ReadFile(cfg.CredentialsFile)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "object store: %w", err)
	}
	var secret struct {
		AccessKey string `json:"access_key"`
		SecretKey string `json:"secret_key"`
	}
	if err := json.Unmarshal(b, &secret); err != nil || secret.AccessKey == "" || secret.SecretKey == "" {
		return nil, switchback.Errorf(switchback.CodeInvalid, `object store: %s does not hold {"access_key": …, "secret_key": …}`, cfg.CredentialsFile)
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ResponseHeaderTimeout: answerLimit,
		MaxIdleConnsPerHost:   16,
		IdleConnTimeout:       time.Minute,
		DisableCompression:    true,
	}
	client, err := minio.New(u.Host, &minio.Options{
		Creds: credentials.NewStaticV4(secret.AccessKey, secret.SecretKey, ""), Secure: u.Scheme == "https",
		Region: cfg.Region, Transport: transport, MaxRetries: 3, BucketLookup: minio.BucketLookupAuto,
	})
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "object store: %w", err)
	}
	return &Store{cfg: cfg, client: client}, nil
}

// Features are what the bucket can do.
type Features struct {
	// Holds: objects can be held against removal.
	Holds bool `json:"holds"`
}

// Check talks to the store: the bucket is there, and an object can be written, read and removed.
func (s *Store) Check(ctx context.Context) (Features, error) {
	var f Features
	ok, err := s.client.BucketExists(ctx, s.cfg.Bucket)
	if err != nil {
		return f, s.fault(err, "look at bucket %s", s.cfg.Bucket)
	}
	if !ok {
		return f, switchback.Errorf(switchback.CodeNotFound, "object store %s has no bucket %s", s.cfg.Endpoint, s.cfg.Bucket).WithHint("make it, with object lock if locked points are to be held there")
	}
	if lock, _, _, _, err := s.client.GetObjectLockConfig(ctx, s.cfg.Bucket); err == nil {
		f.Holds = lock == "Enabled"
	}
	probe := fmt.Sprintf("probe-%d", time.Now().UnixNano())
	if err := s.Put(ctx, probe, strings.NewReader("switchback"), 10); err != nil {
		return f, err
	}
	o, err := s.Open(ctx, probe)
	if err == nil {
		b := make([]byte, 10)
		if _, err = o.ReadAt(b, 0); err == nil && string(b) != "switchback" {
			err = switchback.Errorf(switchback.CodeCorrupt, "object store %s returns other bytes than were written", s.cfg.Endpoint)
		}
	}
	return f, errors.Join(err, s.Remove(ctx, probe))
}

func (s *Store) name(key string) string { return path.Join(s.cfg.Prefix, key) }

// String is the place as people read it.
func (s *Store) String() string { return "s3:" + s.cfg.Bucket + "/" + s.cfg.Prefix }

const sumKey = "Switchback-Sha256"

// Put writes an object of size bytes. Repeating it with the same content is
// accepted; with other content it is CodeConflict. r is read twice: to sum, then to send.
func (s *Store) Put(ctx context.Context, key string, r io.ReadSeeker, size int64) error {
	h := sha256.New()
	n, err := io.Copy(h, r)
	if err != nil {
		return err
	}
	if n != size {
		return switchback.Errorf(switchback.CodeInternal, "object %s has %d bytes, not %d", key, n, size)
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		return err
	}
	sum := hex.EncodeToString(h.Sum(nil))
	opts := minio.PutObjectOptions{ContentType: "application/octet-stream", UserMetadata: map[string]string{sumKey: sum}, PartSize: 32 << 20, NumThreads: 2}
	opts.SetMatchETagExcept("*") // create only
	_, err = s.client.PutObject(ctx, s.cfg.Bucket, s.name(key), r, size, opts)
	if err == nil {
		return nil
	}
	if c := minio.ToErrorResponse(err); c.StatusCode == http.StatusPreconditionFailed || c.StatusCode == http.StatusConflict {
		st, serr := s.client.StatObject(ctx, s.cfg.Bucket, s.name(key), minio.StatObjectOptions{})
		if serr != nil {
			return s.fault(serr, "look at object %s", key)
		}
		if st.Size == size && st.UserMetadata[sumKey] == sum {
			return nil
		}
		return switchback.Errorf(switchback.CodeConflict, "%v holds another object %s already", s, key).WithHint("give each installation a prefix of its own")
	}
	return s.fault(err, "write object %s", key)
}

// Info is one object of a listing.
type Info struct {
	Key  string
	Size int64
}

// List returns the objects whose keys begin with prefix.
func (s *Store) List(ctx context.Context, prefix string) ([]Info, error) {
	var out []Info
	root := ""
	if s.cfg.Prefix != "" {
		root = strings.TrimSuffix(s.cfg.Prefix, "/") + "/"
	}
	for o := range s.client.ListObjects(ctx, s.cfg.Bucket, minio.ListObjectsOptions{Prefix: root + prefix, Recursive: true}) {
		if o.Err != nil {
			return nil, s.fault(o.Err, "list objects")
		}
		out = append(out, Info{strings.TrimPrefix(o.Key, root), o.Size})
	}
	return out, ctx.Err()
}

// Remove deletes an object with all its versions; one that is not there is no
// error. CodeRefused: it is held.
func (s *Store) Remove(ctx context.Context, key string) error {
	found := false
	for o := range s.client.ListObjects(ctx, s.cfg.Bucket, minio.ListObjectsOptions{Prefix: s.name(key), Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			// Not every store lists versions.
			break
		}
		if o.Key != s.name(key) {
			continue
		}
		found = true
		if err := s.client.RemoveObject(ctx, s.cfg.Bucket, o.Key, minio.RemoveObjectOptions{VersionID: o.VersionID}); err != nil {
			return s.fault(err, "remove object %s", key)
		}
	}
	if found {
		return nil
	}
	err := s.client.RemoveObject(ctx, s.cfg.Bucket, s.name(key), minio.RemoveObjectOptions{})
	if c := minio.ToErrorResponse(err); err != nil && c.StatusCode == http.StatusNotFound {
		return nil
	}
	return s.fault(err, "remove object %s", key)
}

// Hold sets or lifts the legal hold of an object: while it is set the store
// itself refuses to remove or replace it. CodeUnsupported: the bucket has no object lock.
func (s *Store) Hold(ctx context.Context, key string, on bool) error {
	status := minio.LegalHoldDisabled
	if on {
		status = minio.LegalHoldEnabled
	}
	err := s.client.PutObjectLegalHold(ctx, s.cfg.Bucket, s.name(key), minio.PutObjectLegalHoldOptions{Status: &status})
	if c := minio.ToErrorResponse(err); err != nil && (c.StatusCode == http.StatusBadRequest || c.Code == "InvalidBucketObjectLockConfiguration" || c.Code == "ObjectLockConfigurationNotFoundError") {
		return switchback.Errorf(switchback.CodeUnsupported, "bucket %s has no object lock: %w", s.cfg.Bucket, err).WithHint("make the bucket with object lock; it cannot be turned on everywhere later")
	}
	return s.fault(err, "hold object %s", key)
}

// fault gives an error of the store its code. nil stays nil.
func (s *Store) fault(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	what := fmt.Sprintf(format, args...)
	where := s.cfg.Endpoint
	c := minio.ToErrorResponse(err)
	switch {
	case errors.Is(err, context.Canceled):
		return switchback.Errorf(switchback.CodeCancelled, "%s: %w", what, err)
	case c.StatusCode == http.StatusNotFound:
		return switchback.Errorf(switchback.CodeNotFound, "%s: %s: %w", what, where, err)
	case c.Code == "QuotaExceeded" || c.Code == "XMinioStorageFull" || c.StatusCode == http.StatusInsufficientStorage:
		return switchback.Errorf(switchback.CodeNoSpace, "%s: %s: %w", what, where, err).WithHint("free space in bucket %s or raise its quota", s.cfg.Bucket)
	case c.StatusCode == http.StatusForbidden && strings.Contains(strings.ToLower(c.Message+c.Code), "lock"):
		return switchback.Errorf(switchback.CodeRefused, "%s: it is held: %w", what, err).WithHint("unlock the point first")
	case c.StatusCode == http.StatusForbidden || c.StatusCode == http.StatusUnauthorized:
		return switchback.Errorf(switchback.CodeUnauthorized, "%s: %s: %w", what, where, err).WithHint("see what the access key in %s may do", s.cfg.CredentialsFile)
	}
	return switchback.Errorf(switchback.CodeUnavailable, "%s: %s: %w", what, where, err).WithHint("see that the object store answers; it is tried again")
}
