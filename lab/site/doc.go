// Package site runs a Switchback site for the lab: one isolated libvirtd in its
// own mount and network namespaces, without systemd, virtlogd or a container
// engine. Several sites live on one machine and know nothing of each other.
//
// A small holder process (`sleep infinity`) owns the namespaces, so libvirtd
// can be stopped, killed and restarted inside them. Within the namespaces these
// directories are the site's own, so that one domain XML fits every site:
//
//	/etc/libvirt            Dir/etc-libvirt
//	/var/lib/libvirt        Dir/lib-libvirt      disks: /var/lib/libvirt/images
//	/var/cache/libvirt      Dir/cache-libvirt    capabilities may be shared
//	/var/log/libvirt        Dir/log-libvirt      consoles: /var/log/libvirt/qemu
//	/run/libvirt            RunDir/libvirt       tmpfs: libvirt fsyncs status XML there
//	/etc/switchback         Dir/etc-switchback
//	/var/lib/switchback     Dir/lib-switchback
//	/run/switchback         RunDir/switchback
//
// The rest of the file system, the PID space and the users are the machine's.
// (*Site).HostPath translates a path inside to the path outside.
//
// Guarantees: Start returns a site whose libvirtd answers calls, or leaves
// nothing behind. Destroy ends every process in the namespaces (guests, agent,
// libvirtd, holder) and returns when they are gone. Guests survive Stop, Kill
// and Restart, as they survive those of a real libvirtd.
//
// Owed by the caller: root (CAP_SYS_ADMIN), Destroy for each Start that
// succeeded, and one controlling process at a time for each site.
package site
