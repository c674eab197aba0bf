#!/bin/sh
# install-packages.sh [--check] [GROUP...] - installs the Debian packages that Switchback's lab,
# tests and benchmarks need, where they are missing. Debian 12, as root.
#
# Groups: demo (make demo), test (make test), bench (make bench). Default: demo and test.
# --check installs nothing: it lists what is missing, one package a line, and exits 1 if
# anything is. It starts no service: sites run a libvirtd of their own.
#
# For this script's own test: DPKG_STATUS names another package database to look into, POLICY_RC_D
# another place of the policy.
set -eu

demo='qemu-system-x86 qemu-utils libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system
libvirt-clients e2fsprogs iproute2 util-linux mount libnbd-bin ca-certificates make'
test="$demo nbdkit git postgresql-15 iptables"
bench="$test virtnbdbackup"
# Every libvirtd wants the user libvirt-qemu, whom only libvirt-daemon-system makes.

check=
wanted=
for a in "$@"; do
	case $a in
	--check) check=1 ;;
	demo) wanted="$wanted $demo" ;;
	test) wanted="$wanted $test" ;;
	bench) wanted="$wanted $bench" ;;
	*)
		echo "usage: $0 [--check] [demo|test|bench ...]" >&2
		exit 2
		;;
	esac
done
: "${wanted:=$demo $test}"

# One pass over the package database: dpkg-query costs as much for one package as for all.
# shellcheck disable=SC2086 # the list is words
missing=$(awk -v wanted="$(echo $wanted)" '
	/^Package: / { name = $2 }
	/^Status: .* ok installed$/ { have[name] = 1 }
	END {
		n = split(wanted, w, " ")
		for (i = 1; i <= n; i++)
			if (!(w[i] in have) && !(w[i] in said)) { print w[i]; said[w[i]] = 1 }
	}' "${DPKG_STATUS:-/var/lib/dpkg/status}")

if [ -z "$missing" ]; then
	exit 0
fi
if [ -n "$check" ]; then
	echo "$missing"
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	echo "$0: these packages are missing, and installing them needs root:" >&2
	echo "$missing" >&2
	exit 1
fi

# Packages must not start their services: the lab does not use them, and a bare root has
# no init. A policy of the machine's own is put back.
policy=${POLICY_RC_D:-/usr/sbin/policy-rc.d}
saved=
restore() {
	rm -f "$policy"
	if [ -n "$saved" ]; then mv "$saved" "$policy"; fi
}
if [ -e "$policy" ]; then
	saved=$policy.switchback
	mv "$policy" "$saved"
fi
trap restore EXIT
trap 'exit 130' INT TERM
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
set -- $missing
echo "installing: $*"
if ! apt-get install -y -q --no-install-recommends "$@"; then
	# The lists may be missing or stale.
	apt-get update -q
	apt-get install -y -q --no-install-recommends "$@"
fi
