package api

import (
	switchback "github.com/switchback-dr/switchback"
)

// Principal is who asks, and what they may.
type Principal struct {
	// Name is the person's or program's; operations and the audit log say it.
	Name  string                `json:"name"`
	Role  switchback.AccessRole `json:"role"`
	Scope switchback.Scope      `json:"scope"`
	// Via is "certificate", or "token" and its ID.
	Via string `json:"via"`
}

// Tags of a VM.
type Tags struct {
	Tags []string `json:"tags"`
}
