package api

import (
	"context"
	"net/http"
	"net/url"

	switchback "github.com/switchback-dr/switchback"
)

// SiteDetail is a site with what its agents work for.
type SiteDetail struct {
	Site
	// Copies are first copies under way from or to the site.
	Copies int      `json:"copies"`
	VMs    []SiteVM `json:"vms"`
}

// SiteVM is a protected VM, as one of its sites sees it.
type SiteVM struct {
	ID    switchback.ProtectionID `json:"id"`
	Name  string                  `json:"name"`
	Phase switchback.Phase        `json:"phase"`
	// Part is "active" or "target"; Agent does the work.
	Part         string             `json:"part"`
	Agent        switchback.AgentID `json:"agent"`
	Disks        int                `json:"disks"`
	Points       int                `json:"points"`
	JournalBytes int64              `json:"journal_bytes"`
}

// Site returns one site with capacity, limits and VMs.
func (c *Client) Site(ctx context.Context, id switchback.SiteID) (SiteDetail, error) {
	return call[SiteDetail](ctx, c, http.MethodGet, "/v1/sites/"+url.PathEscape(string(id)), nil)
}
