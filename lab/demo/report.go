package demo

// Report is demo.json: what the demo saw. Byte counts are of the interface of
// the WAN, disks are judged by package witness.
type Report struct {
	Result   string   `json:"result"` // "ok" or "failed"
	Failures []string `json:"failures,omitempty"`
	Seconds  float64  `json:"seconds"`
	KVM      bool     `json:"kvm"`
	VMs      []VM     `json:"vms"`
	Seed     Seed     `json:"seed"`
	Cycles   Cycles   `json:"cycles"`
	Drill    Drill    `json:"drill"`
	Change   Change   `json:"change"`
	Failover Failover `json:"failover"`
	Commit   Commit   `json:"commit"`
	Failback Failback `json:"failback"`
	// DoubleActiveSeconds is the overlap of QEMU lifetimes of one UUID at both sites.
	DoubleActiveSeconds float64 `json:"double_active_seconds"`
	Steps               []Step  `json:"steps"`
}

// VM is one VM of the demo.
type VM struct {
	Name      string `json:"name"`
	DiskBytes int64  `json:"disk_bytes"`
}

// Seed is the first full copy of all VMs.
type Seed struct {
	BytesSent      int64   `json:"bytes_sent"`
	BytesAllocated int64   `json:"bytes_allocated"`
	Seconds        float64 `json:"seconds"`
}

// Cycles are the incremental ones before the failover.
type Cycles struct {
	Count           int64   `json:"count"`
	IntervalSeconds float64 `json:"interval_seconds"`
	RPO             RPO     `json:"rpo_seconds"`
	BytesSent       int64   `json:"bytes_sent"`
	BytesChanged    int64   `json:"bytes_changed"`
}

// Change is a change of the point before commit, to an older one and back.
type Change struct {
	VM    string `json:"vm"`
	Point uint64 `json:"point"`
	// The newest record of the guest: before, when it ran from the older point, and
	// when it was back on what it had written.
	RecordBefore  uint64 `json:"record_before"`
	RecordAtPoint uint64 `json:"record_at_point"`
	RecordAfter   uint64 `json:"record_after"`
	// From the guest seen off to the guest let run.
	OutageSeconds     float64 `json:"outage_seconds"`
	OutageBackSeconds float64 `json:"outage_back_seconds"`
}

// Drill is a copy of a point that ran beside its VM.
type Drill struct {
	VM     string `json:"vm"`
	Passed bool   `json:"passed"`
	// From the request.
	GuestUpSeconds float64 `json:"guest_up_seconds"`
	CheckedSeconds float64 `json:"checked_seconds"`
	BytesWritten   int64   `json:"bytes_written"`
	// PointsMeanwhile came from the VM itself.
	PointsMeanwhile int64 `json:"points_meanwhile"`
	// Left: its domain is still there.
	Left bool `json:"left"`
}

// RPO is the age of the last point just before the next one was durable; the worse VM's.
type RPO struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// Switch is what holds of every planned switch; the worse VM's.
type Switch struct {
	// OutageSeconds is from the old QEMU's end to the new guest's first line of
	// user space.
	OutageSeconds          float64 `json:"outage_seconds"`
	AcknowledgedWritesLost int64   `json:"acknowledged_writes_lost"`
	AcknowledgedWrites     int64   `json:"acknowledged_writes"`
	// LastAckSeconds is how long before power-off the last acknowledgement came.
	LastAckSeconds  float64 `json:"last_ack_seconds_before_poweroff"`
	OrderViolations int64   `json:"order_violations"`
	DisksIdentical  bool    `json:"disks_identical"`
	Disks           []Disk  `json:"disks"`
}

// Disk is one disk at a cut-over.
type Disk struct {
	VM           string `json:"vm"`
	Disk         string `json:"disk"`
	SourceSHA256 string `json:"source_sha256"`
	TargetSHA256 string `json:"target_sha256"`
}

// Failover is the switch away from home.
type Failover struct {
	Switch
	// BootRatio is the boot from the view ÷ the boot from a plain local image, medians.
	BootRatio        float64   `json:"boot_ratio"`
	BootViewSeconds  []float64 `json:"boot_view_seconds"`
	BootPlainSeconds []float64 `json:"boot_plain_seconds"`
	// AgentKilledIOErrors counts I/O errors of the guest while the agent was
	// killed and started again under its cold reads.
	AgentKilledIOErrors int64 `json:"agent_killed_io_errors"`
}

// Commit is the one after the failover.
type Commit struct {
	BytesCopied int64   `json:"bytes_copied"`
	Seconds     float64 `json:"seconds"`
	// PlainDisks: live and inactive definition name plain images without backing.
	PlainDisks bool `json:"plain_disks"`
	// RunsWithoutAgent: the guest wrote on while the agent was stopped.
	RunsWithoutAgent bool `json:"runs_without_agent"`
}

// Failback is the way home: reprotect by delta, then the switch.
type Failback struct {
	Switch
	// BytesSent counts the WAN from reprotect to its first point; BytesChanged
	// the 64 KiB blocks that differ between the home disks as they were left
	// and that point.
	BytesSent    int64        `json:"bytes_sent"`
	BytesChanged int64        `json:"bytes_changed"`
	DiskBytes    int64        `json:"disk_bytes"`
	VMs          []FailbackVM `json:"vms"`
}

// FailbackVM is the delta of one VM.
type FailbackVM struct {
	Name         string  `json:"name"`
	BytesSent    int64   `json:"bytes_sent"`
	BytesChanged int64   `json:"bytes_changed"`
	Seconds      float64 `json:"seconds"`
}

// Step is one step of one operation.
type Step struct {
	Operation string  `json:"operation"`
	Step      string  `json:"step"`
	Seconds   float64 `json:"seconds"`
}
