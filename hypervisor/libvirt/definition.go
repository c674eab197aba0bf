package libvirt

import "github.com/switchback-dr/switchback/hypervisor"

// ParseDefinition reads what a domain XML says. State, sizes, persistence and
// autostart are not in it.
func ParseDefinition(text string) (hypervisor.Domain, error) {
	d, err := parseDomain(text)
	return d, wrap("libvirt.ParseDefinition", err)
}

// TranslateDefinition is (*Driver).Translate for those who have no driver.
func TranslateDefinition(definition string, t hypervisor.Translation) (string, error) {
	return translate(definition, t)
}
