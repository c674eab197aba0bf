package switchback

// Disk is one disk of a protected VM.
type Disk struct {
	// Name is the target device name in the domain, e.g. "vda". It is the
	// disk's identity at both sites.
	Name string `json:"name"`
	// SizeBytes is the virtual size.
	SizeBytes int64 `json:"size_bytes"`
	// Path is the image file at the site that describes the disk.
	Path string `json:"path,omitempty"`
	// Format is the image format: "qcow2" for every disk that can be protected.
	Format string `json:"format,omitempty"`
	// AllocatedBytes is what the image occupies at its site; 0 when unknown.
	AllocatedBytes int64 `json:"allocated_bytes,omitempty"`
}

// DisksSize returns the sum of the virtual sizes in bytes.
func DisksSize(disks []Disk) int64 {
	var n int64
	for _, d := range disks {
		n += d.SizeBytes
	}
	return n
}
