package switchback

import "testing"

func TestAccessRole(t *testing.T) {
	for _, x := range []struct {
		has, need AccessRole
		want      bool
	}{
		{Viewer, Viewer, true}, {Viewer, Operator, false}, {Operator, Viewer, true}, {Operator, Administrator, false},
		{Administrator, Operator, true}, {"", Viewer, false}, {"root", Viewer, false},
	} {
		if got := x.has.Includes(x.need); got != x.want {
			t.Errorf("%q includes %q: %v", x.has, x.need, got)
		}
	}
	if _, err := ParseAccessRole("root"); CodeOf(err) != CodeInvalid {
		t.Error(err)
	}
}

func TestScope(t *testing.T) {
	for _, x := range []struct {
		name     string
		s        Scope
		vm, site bool
	}{
		{"all", Scope{}, true, true},
		{"its site", Scope{Sites: []SiteID{"riga", "berlin"}}, true, true},
		{"another site", Scope{Sites: []SiteID{"riga"}}, false, false},
		{"its tag", Scope{Tags: []string{"db", "gold"}}, true, false},
		{"another tag", Scope{Tags: []string{"db"}}, false, false},
		{"its tag at another site", Scope{Sites: []SiteID{"riga"}, Tags: []string{"gold"}}, false, false},
	} {
		if got := x.s.HasVM("berlin", []string{"gold"}); got != x.vm {
			t.Errorf("%s: VM %v", x.name, got)
		}
		if got := x.s.HasSite("berlin"); got != x.site {
			t.Errorf("%s: site %v", x.name, got)
		}
	}
}
