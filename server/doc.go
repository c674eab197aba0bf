// Package server is the control plane: sites and agents, protected VMs, and the
// durable operations that move them. It decides with package recovery, remembers
// with package store, runs with package operation, and lets agents do the work.
// Replication goes on without it.
package server
