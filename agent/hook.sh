#!/bin/sh
# Installed by Switchback. Refuses the start of a VM that is active at another
# site, and of one that nobody has confirmed to be active here since the host
# booted. Only "prepare begin" may be refused: a refusal of "reconnect" would
# make libvirtd kill running guests.
[ "$2 $3" = "prepare begin" ] || exit 0
uuid=$(sed -n 's|.*<uuid>\([0-9a-fA-F-]*\)</uuid>.*|\1|p' | head -n 1 | tr 'A-F' 'a-f')
[ -n "$uuid" ] || exit 0
if [ -f "@FENCE_DIR@/$uuid" ]; then
	printf 'fenced by Switchback: %s\n' "$(cat "@FENCE_DIR@/$uuid")" >&2
	exit 1
fi
guard="@GUARD_DIR@/$uuid" grant="@GRANT_DIR@/$uuid"
[ -f "$guard" ] || exit 0
hold() {
	printf 'held by Switchback: %s. %s\n' "$1" "$(sed 1d "$guard")" >&2
	exit 1
}
value() { sed -n "s/^$1 //p" "$2" | head -n 1; }
epoch=$(value epoch "$guard")
[ "$epoch" != none ] || hold "it may not be started now"
[ -f "$grant" ] || hold "there is no grant for it since this host booted"
[ "$(value epoch "$grant")" = "$epoch" ] || hold "its grant is not of epoch $epoch"
case $(value boot "$grant") in
"$(cat /proc/sys/kernel/random/boot_id)"-*) ;;
*) hold "its grant is of an earlier boot" ;;
esac
until=$(value until "$grant")
[ "${until:-1}" = 0 ] || [ "$(cut -d. -f1 /proc/uptime)" -lt "${until:-0}" ] || hold "its lease has ended"
exit 0
