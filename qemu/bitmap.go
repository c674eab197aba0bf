package qemu

import (
	"context"
	"strconv"
)

// AddBitmap makes a persistent bitmap in a qcow2 image, which records from now
// on. A granularity of 0 is QEMU's default. The image must not be open for writing.
func AddBitmap(ctx context.Context, path, name string, granularityBytes int64) error {
	args := []string{"bitmap", "--add"}
	if granularityBytes > 0 {
		args = append(args, "-g", strconv.FormatInt(granularityBytes, 10))
	}
	_, err := run(ctx, append(args, "-f", "qcow2", imageName(path), name)...)
	return err
}

// RemoveBitmap deletes a bitmap, also an inconsistent one.
func RemoveBitmap(ctx context.Context, path, name string) error {
	_, err := run(ctx, "bitmap", "--remove", "-f", "qcow2", imageName(path), name)
	return err
}

// MergeBitmap adds what the bitmap from has marked to the bitmap into of the
// image at path. fromPath is the qcow2 image that holds from; empty is the
// same image. Granularities may differ. from stays as it is.
func MergeBitmap(ctx context.Context, path, into, from, fromPath string) error {
	args := []string{"bitmap", "--merge", from}
	if fromPath != "" {
		args = append(args, "-b", imageName(fromPath), "-F", "qcow2")
	}
	_, err := run(ctx, append(args, "-f", "qcow2", imageName(path), into)...)
	return err
}
