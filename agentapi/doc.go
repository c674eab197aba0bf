// Package agentapi is what server and agents say to each other: the actions an
// agent carries out for the server, and the peer calls by which one agent
// ships points to another. It holds the types and the client; the agent
// serves them. All of it is HTTP inside mutual TLS.
//
// An action is a task with a key (operation and step). Asking for a task that
// runs already attaches to it; asking for one that failed, or that an agent
// restart forgot, carries it out again: every action works from facts and is
// idempotent. Every action on a protected VM carries the epoch and is refused
// with CodeStaleEpoch when the agent knows a newer one.
package agentapi
