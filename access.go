package switchback

import (
	"slices"
	"strings"
)

// AccessRole says what a person, or a program on their behalf, may ask of the server.
type AccessRole string

const (
	// Viewer sees everything in its scope and changes nothing.
	Viewer AccessRole = "viewer"
	// Operator also runs operations on VMs: moves, drills, points; and approves those of others.
	Operator AccessRole = "operator"
	// Administrator also changes what all rests on: sites, tokens, tags, approvals; and reads the audit log.
	Administrator AccessRole = "administrator"
)

// AccessRoles from the least to the most.
var AccessRoles = []AccessRole{Viewer, Operator, Administrator}

// Includes reports whether r may do what takes the role need.
func (r AccessRole) Includes(need AccessRole) bool {
	return slices.Contains(AccessRoles, r) && slices.Index(AccessRoles, r) >= slices.Index(AccessRoles, need)
}

// ParseAccessRole returns the role of that name, or CodeInvalid.
func ParseAccessRole(name string) (AccessRole, error) {
	if r := AccessRole(name); slices.Contains(AccessRoles, r) {
		return r, nil
	}
	return "", Errorf(CodeInvalid, "unknown role %q", name).WithHint("viewer, operator or administrator")
}

// Scope is what a role is limited to. Empty lists do not limit; of both, both count.
type Scope struct {
	// Sites: only VMs whose home is one of these, and these sites.
	Sites []SiteID `json:"sites,omitempty"`
	// Tags: only VMs that have one of these, and no site as such.
	Tags []string `json:"tags,omitempty"`
}

// All reports whether the scope limits nothing.
func (s Scope) All() bool { return len(s.Sites) == 0 && len(s.Tags) == 0 }

// String says what the scope covers, for people.
func (s Scope) String() string {
	var parts []string
	for _, site := range s.Sites {
		parts = append(parts, "site "+string(site))
	}
	for _, t := range s.Tags {
		parts = append(parts, "tag "+t)
	}
	if len(parts) == 0 {
		return "everything"
	}
	return strings.Join(parts, ", ")
}

// HasSite reports whether a site as such is in scope.
func (s Scope) HasSite(id SiteID) bool {
	return len(s.Tags) == 0 && (len(s.Sites) == 0 || slices.Contains(s.Sites, id))
}

// HasVM reports whether a protected VM of that home with these tags is in scope.
func (s Scope) HasVM(home SiteID, tags []string) bool {
	return (len(s.Sites) == 0 || slices.Contains(s.Sites, home)) &&
		(len(s.Tags) == 0 || slices.ContainsFunc(s.Tags, func(t string) bool { return slices.Contains(tags, t) }))
}
