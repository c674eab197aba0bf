package qemu

import "context"

// Image names an image and its format, which is not probed.
type Image struct{ Path, Format string }

// ConvertOptions say how Convert copies.
type ConvertOptions struct {
	// ForceShare reads the source though somebody has it open for writing. The
	// copy is then a mix of states unless the writer pauses.
	ForceShare bool
	// Existing writes into a target that is there already and large enough.
	Existing bool
	// Compress the clusters of a qcow2 target.
	Compress bool
	// Bitmaps copies persistent bitmaps, qcow2 to qcow2.
	Bitmaps bool
	// ClusterSizeBytes of a new qcow2 target; 0 is QEMU's default.
	ClusterSizeBytes int64
}

// Convert copies the content of src, including what its backing images hold,
// to dst, which stands alone. Zeros are left sparse. Without Existing a file at
// dst is overwritten.
func Convert(ctx context.Context, src, dst Image, o ConvertOptions) error {
	args := []string{"convert", "-q", "-f", src.Format, "-O", dst.Format}
	if o.ForceShare {
		args = append(args, "-U")
	}
	if o.Existing {
		args = append(args, "-n")
	}
	if o.Compress {
		args = append(args, "-c")
	}
	if o.Bitmaps {
		args = append(args, "--bitmaps")
	}
	if o.ClusterSizeBytes > 0 {
		args = append(args, "-o", clusterSize(o.ClusterSizeBytes))
	}
	_, err := run(ctx, append(args, imageName(src.Path), imageName(dst.Path))...)
	return err
}

// Compare reports whether two images have the same content. Where one is
// longer, the rest must be zeros. Images that somebody has open are read too.
func Compare(ctx context.Context, a, b Image) (equal bool, err error) {
	_, err = run(ctx, "compare", "-q", "-U", "-f", a.Format, "-F", b.Format, imageName(a.Path), imageName(b.Path))
	if exitStatus(err) == 1 { // qemu-img(1), "compare"
		return false, nil
	}
	return err == nil, err
}
