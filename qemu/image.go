package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// CreateOptions describe a new image.
type CreateOptions struct {
	// Format is "qcow2" or "raw".
	Format string
	// SizeBytes is the virtual size; 0 takes that of Backing.
	SizeBytes int64
	// Backing and BackingFormat name the image below, if any. The name is
	// written as it is; a relative one is relative to the new image.
	Backing, BackingFormat string
	// ClusterSizeBytes of a qcow2 image; 0 is QEMU's default, 64 KiB. It is
	// also the granularity that libvirt gives the image's bitmaps.
	ClusterSizeBytes int64
}

// Create makes an image. A file at path that is not empty is CodeConflict: the
// tool would overwrite it without a word. A backing image is opened to see that
// it is there.
func Create(ctx context.Context, path string, o CreateOptions) error {
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Size() > 0 {
		return switchback.Errorf(switchback.CodeConflict, "create image: %s exists", path)
	}
	if o.Format == "" || o.Backing != "" && o.BackingFormat == "" {
		return switchback.Errorf(switchback.CodeInvalid, "create image %s: formats must be given", path)
	}
	args := []string{"create", "-q", "-f", o.Format}
	if o.Backing != "" {
		args = append(args, "-b", o.Backing, "-F", o.BackingFormat)
	}
	if o.ClusterSizeBytes > 0 {
		args = append(args, "-o", clusterSize(o.ClusterSizeBytes))
	}
	args = append(args, imageName(path))
	if o.SizeBytes > 0 || o.Backing == "" {
		args = append(args, strconv.FormatInt(o.SizeBytes, 10))
	}
	_, err := run(ctx, args...)
	return err
}

func clusterSize(n int64) string { return fmt.Sprintf("cluster_size=%d", n) }

// ImageInfo is what an image's header says.
type ImageInfo struct {
	// Format is probed: a raw disk may look like any other.
	Format           string
	VirtualSizeBytes int64
	ActualSizeBytes  int64 // allocated in the file system
	ClusterSizeBytes int64 // 0 for raw
	// Backing is as it stands in the header, BackingFormat may be empty.
	Backing, BackingFormat string
	Bitmaps                []Bitmap // persistent ones
	// Corrupt: QEMU found damage and refuses to write.
	Corrupt bool
}

// Bitmap is a persistent dirty bitmap of a qcow2 image.
type Bitmap struct {
	Name             string
	GranularityBytes int64
	// InUse: a writer that opened the image did not store the bitmap when it
	// ended, or has not ended. Once no writer has the image open this is a lost bitmap.
	InUse bool
	// Auto: the bitmap records while the image is written.
	Auto bool
}

// Inconsistent reports whether the bitmap can no longer be trusted, given that
// nobody has the image open for writing.
func (b Bitmap) Inconsistent() bool { return b.InUse }

// Bitmap finds one by name.
func (i ImageInfo) Bitmap(name string) (Bitmap, bool) {
	n := slices.IndexFunc(i.Bitmaps, func(b Bitmap) bool { return b.Name == name })
	if n < 0 {
		return Bitmap{}, false
	}
	return i.Bitmaps[n], true
}

// Info reads an image's header, also while others have the image open; it may
// then be out of date.
func Info(ctx context.Context, path string) (ImageInfo, error) {
	out, err := run(ctx, "info", "-U", "--output=json", imageName(path))
	if err != nil {
		return ImageInfo{}, err
	}
	return parseInfo(out)
}

func parseInfo(out []byte) (ImageInfo, error) {
	var j struct {
		Format        string `json:"format"`
		VirtualSize   int64  `json:"virtual-size"`
		ActualSize    int64  `json:"actual-size"`
		ClusterSize   int64  `json:"cluster-size"`
		Backing       string `json:"backing-filename"`
		BackingFormat string `json:"backing-filename-format"`
		Specific      struct {
			Data struct {
				Corrupt bool `json:"corrupt"`
				Bitmaps []struct {
					Name        string   `json:"name"`
					Granularity int64    `json:"granularity"`
					Flags       []string `json:"flags"`
				} `json:"bitmaps"`
			} `json:"data"`
		} `json:"format-specific"`
	}
	if err := json.Unmarshal(out, &j); err != nil {
		return ImageInfo{}, switchback.Errorf(switchback.CodeInternal, "read qemu-img's answer: %w", err)
	}
	info := ImageInfo{Format: j.Format, VirtualSizeBytes: j.VirtualSize, ActualSizeBytes: j.ActualSize,
		ClusterSizeBytes: j.ClusterSize, Backing: j.Backing, BackingFormat: j.BackingFormat, Corrupt: j.Specific.Data.Corrupt}
	for _, b := range j.Specific.Data.Bitmaps {
		info.Bitmaps = append(info.Bitmaps, Bitmap{Name: b.Name, GranularityBytes: b.Granularity,
			InUse: slices.Contains(b.Flags, "in-use"), Auto: slices.Contains(b.Flags, "auto")})
	}
	return info, nil
}

// Resize grows an image. Shrinking is refused by the tool.
func Resize(ctx context.Context, image Image, sizeBytes int64) error {
	_, err := run(ctx, "resize", "-q", "-f", image.Format, imageName(image.Path), strconv.FormatInt(sizeBytes, 10))
	return err
}

// Rebase writes another backing image into a qcow2 header without reading or
// changing any content. The caller owes that the new chain reads the same.
// An empty backing makes the image stand alone.
func Rebase(ctx context.Context, path, backing, format string) error {
	args := []string{"rebase", "-q", "-u", "-f", "qcow2", "-b", backing}
	if backing != "" {
		args = append(args, "-F", format)
	}
	_, err := run(ctx, append(args, imageName(path))...)
	return err
}

// Commit writes the content of a qcow2 overlay into base, a qcow2 or raw image
// somewhere below it; an empty base is the one right below. The overlay keeps
// its content and still reads the same; images between the two become invalid.
// Bitmaps are not carried down: see MergeBitmap.
func Commit(ctx context.Context, overlay, base string) error {
	args := []string{"commit", "-q", "-d", "-f", "qcow2"}
	if base != "" {
		args = append(args, "-b", base)
	}
	_, err := run(ctx, append(args, imageName(overlay))...)
	return err
}

// Check verifies a qcow2 image's structure. Damage is CodeCorrupt. Leaked
// clusters, which a killed writer leaves behind, waste space and are no error.
func Check(ctx context.Context, path string) error {
	_, err := run(ctx, "check", "-q", "-f", "qcow2", imageName(path))
	status := exitStatus(err) // qemu-img(1), "check"
	switch {
	case status == 2, status == 1 && strings.Contains(err.Error(), "ERROR "): // so bad that the check could not go on
		return &switchback.Error{Code: switchback.CodeCorrupt, Op: "qemu-img check", Message: "image " + path + " is damaged", Err: err}
	case status == 3:
		return nil
	}
	return err
}
