// Package check judges a guest that was started: at failover, failback and in
// drills. Reading and writing the text form of a check, and the verdict, are
// pure; Runner does the checking.
//
// Text form, as flags take it: KIND, then ":TARGET" where the kind has one, then
// options.
//
//	power                           running, and still so after two seconds
//	agent                           the guest agent answers
//	console:REGEXP                  a line on the serial console matches
//	tcp:HOST:PORT                   takes a connection
//	http://… or https://…           answers with a status below 400
//	icmp:ADDRESS                    answers an echo request
//	exec:COMMAND                    ends with status 0 (through the guest agent)
//
//	:optional or ;optional          reported, of no consequence
//	;timeout=DURATION               may take so long to pass; default 2m
//	;retries=N                      is tried again so often; default: all the time
//
// A check is tried again until it passes or its time is over: a guest that boots
// answers late. All checks run at once. The caller owes a Guest, and a device
// where connections must leave through one network and no other.
package check
