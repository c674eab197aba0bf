// Package simulated is a hypervisor without processors and memory: it keeps
// libvirt's definitions, checkpoints and jobs, and its machines have real disks.
// It is for tests that need many machines, quick ones, or ones that can be
// killed at will; the suite in hypervisor/conformance holds it to what the
// driver for libvirt does.
//
//	agent ──HTTP, unix socket──▶ Host (a daemon, in libvirtd's place)
//	                              │ QMP                 │ NBD, writable
//	                              ▼                     ▼ (the guest's program)
//	                             qemu-storage-daemon, one per machine (in QEMU's place)
//
// A machine is a qemu-storage-daemon: QEMU's block layer with its qcow2 images,
// locks, dirty bitmaps, block jobs and NBD server. So images are the very
// files that qemu-img and qemu-nbd work on, a backing view is read by QEMU's
// NBD client, and a machine that is killed loses the bitmaps that it had not
// stored, because QEMU's own code does. Definitions are libvirt's XML, read and
// rewritten by the code of hypervisor/libvirt.
//
// The daemon may be killed and started again: machines go on (without their
// guests' programs meanwhile, which live in the daemon) and are found again.
// Host.PowerCut kills all machines as a loss of power would. All state is in
// one directory:
//
//	config.json        Config
//	domains/UUID.json  definitions, autostart, checkpoints, and what runs
//	console/UUID.log   what the guest's program says
//	hooks/qemu.d/*     called before a machine starts, as libvirt calls them
//	run/               sockets; gone after a power cut
//	hypervisor.sock    the daemon
//
// What the simulation does not have: memory and devices other than disks and
// network names, I/O errors that pause a guest, disks that are not image
// files, and a host's page cache: what a guest has written survives a power cut.
package simulated
