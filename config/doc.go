// Package config is the configuration of an installation as files: YAML documents
// that say which sites there are and which VMs are protected how. Everything that
// can be set is in them; what happens (points, switches, drills) is not.
//
//	kind: Site
//	name: primary
//	---
//	kind: VM
//	name: web
//	home: primary          # where it belongs
//	to: recovery           # the other site; the direction of replication is not configuration
//	networks: {lan: lan-b} # network at home: network at the other site
//	paused: false
//	policy:                # fields as in switchback.Policy
//	  interval: 5s
//	  retention:
//	    tiers: [all:1h, 5m:1d]
//
// Ages are written 90s, 5m, 24h, 30d, sizes 512MiB or 20GiB, tiers and checks as on
// the command line. A field that is not named has its default, so that a file says
// all of what it means; a field that is not known is an error with its line.
// What no file names is left alone: nothing is ever deleted by applying one.
package config
