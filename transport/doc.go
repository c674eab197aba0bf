// Package transport is how Switchback's processes talk: HTTP inside mutual TLS
// 1.3 under the installation's own certificate authority.
//
// # Identities
//
// Every certificate carries one SPIFFE ID as URI subject alternative name
// (https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md), with the
// installation as trust domain:
//
//	spiffe://<installation>/server/<id>
//	spiffe://<installation>/agent/<site>/<id>
//	spiffe://<installation>/admin/<name>
//
// Peers are known by it, never by host name or address.
//
// # Who is checked where
//
// A client checks the server's certificate in the handshake, before anything is
// sent. A server takes any certificate, or none, in the handshake, and
// Authenticate judges it at each request: so a client of another installation,
// or with an expired certificate, gets an answer that says so instead of a
// broken connection. The caller owes: every handler stands behind Authenticate,
// and behind RequireRole or, of the server, its guard of people's requests, unless
// it is /v1/join or one of login.
//
// # Joining
//
// A join token names the servers, the SHA-256 of the CA certificate, and a
// secret. The agent sends the secret only to a server that presents a chain to
// that very CA. The server keeps only the secret's hash, and gives back a
// certificate for the key the agent proved to have.
//
// # Lines
//
// Who cannot be dialled keeps a line (Outbound) to each party that has to call
// it; that party (Inbound) asks over the control connection for data connections,
// on which the roles of client and server are exchanged. A line is a request to
// DialInPath that is upgraded to "switchback-line/1":
//
//	Switchback-Line: control    the other side then says "ping" every 2 s, answered
//	                            by "pong", and "open" for each connection it needs,
//	                            answered by a data connection or "failed WHY"
//	Switchback-Line: data       the other side then sends requests of HTTP/1.1
//	Switchback-Session: TEXT    ties data connections to their control connection
//	Switchback-Address: H:P     where the side that dialled would be reached, if it can be
//
// Each line of text ends in a newline; 8 s without one end the line. A peer that
// dials in is called by its name (AgentName, ServerName) instead of an address.
//
// # Who is believed no more
//
// Credentials believe several authorities while one replaces another (CA.Next), and
// refuse revoked agents: in the handshake, at each request, and in the middle of one.
//
// # Errors
//
// Every error is a *switchback.Error and crosses the wire as
// application/problem+json (RFC 9457), with its code unchanged. A peer that
// cannot be reached is CodeUnavailable, with its address in the message.
package transport
