package hypervisor

import (
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

// Protectable returns the disks of a domain that replicate, or CodeUnsupported
// naming each one that cannot and why. CD-ROMs and floppies are left out.
func Protectable(d Domain) ([]switchback.Disk, error) {
	var disks []switchback.Disk
	reasons := ""
	for _, x := range d.Disks {
		switch {
		case x.Device == "cdrom" || x.Device == "floppy":
		case x.Unsupported != "":
			reasons += fmt.Sprintf("; disk %s: %s", x.Name, x.Unsupported)
		case len(x.Backing) > 0:
			reasons += fmt.Sprintf("; disk %s: its image stands on another (%s)", x.Name, x.Backing[0])
		default:
			disks = append(disks, x.Disk)
		}
	}
	if reasons != "" {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "VM %s cannot be protected%s", d.Name, reasons).
			WithHint("detach such a disk, or convert it to one qcow2 image file without backing")
	}
	if len(disks) == 0 {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "VM %s has no disk that can be protected", d.Name)
	}
	return disks, nil
}
