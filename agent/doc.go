// Package agent is the appliance of a site: it drives the hypervisor, reads
// changes, keeps replicas and serves them, and carries out what the server
// asks (package agentapi).
//
// What an agent must not forget stands in one file per protected VM
// (Assignment), written before the effect it allows: role, epoch, peer, what
// the VM runs on. Everything else is found out again from the domain, the
// replica and the files. A killed agent therefore goes on where it was:
// sources take points again, views whose process died are served again, open
// steps are asked for again by the server and work from what they find.
package agent
