# Run with sh -ceu in new mount and network namespaces.
# $1: the site's directory. $2: kvm or nokvm. Then pairs of directories: outside, inside.
dir=$1 kvm=$2
shift 2
while [ $# -ge 2 ]; do
	mkdir -p "$2"
	mount --bind "$1" "$2"
	shift 2
done
# A read-only regular file over /dev/kvm: libvirt holds KVM for unusable and keeps its
# capability cache. With /dev/null there it would probe QEMU again at every start.
if [ "$kvm" = nokvm ] && [ -e /dev/kvm ]; then
	: > "$dir/no-kvm"
	mount --bind "$dir/no-kvm" /dev/kvm
	mount -o remount,bind,ro /dev/kvm
fi
# Guests are 64-bit; not probing the other emulator halves a cold start.
if [ -e /usr/bin/qemu-system-i386 ]; then
	: > "$dir/no-i386"
	chmod 644 "$dir/no-i386"
	mount --bind "$dir/no-i386" /usr/bin/qemu-system-i386
fi
# No way to the machine's systemd: two sites would register machines of one name.
for d in /run/dbus /run/systemd; do
	if [ -d $d ]; then mount -t tmpfs -o size=64k,mode=755 none $d; fi
done
ip link set lo up
echo ready
exec sleep infinity >/dev/null 2>&1 </dev/null
