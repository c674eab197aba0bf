package agentapi

// Capacity is what an agent works for, and what bounds it. Limits of 0 are none.
type Capacity struct {
	// Disks are those of VMs that it is the source of, or keeps the replica of, or runs from one.
	Disks    int `json:"disks"`
	MaxDisks int `json:"max_disks,omitempty"`
	// MaxCopies is how many first copies may be made at the same time.
	MaxCopies    int `json:"max_copies,omitempty"`
	OpenFiles    int `json:"open_files"`
	MaxOpenFiles int `json:"max_open_files"`
	// StorageReserveBytes stay free in the storage: below it no points are taken.
	StorageReserveBytes int64   `json:"storage_reserve_bytes"`
	Scratch             Storage `json:"scratch"`
}
