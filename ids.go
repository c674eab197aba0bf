package switchback

// ProtectionID names one protected VM for as long as it is protected, in both
// directions. It is chosen by the server and is safe as a file name
// ("p-" and 12 lower-case hexadecimal digits).
type ProtectionID string

// VMUUID is the hypervisor's UUID of a VM in canonical lower-case form. A
// protected VM keeps it at both sites.
type VMUUID string

// SiteID names a site: letters, digits and dashes, chosen by the operator.
type SiteID string

// AgentID names an agent; it is minted by the server when the agent joins.
type AgentID string

// OperationID names one durable run of an operation. IDs sort by creation.
type OperationID string

// Epoch counts the changes of the active site of one protected VM. It is
// minted by the server and only ever grows; whoever holds an older epoch is
// fenced. The zero Epoch is never valid.
type Epoch uint64

// Sequence numbers the recovery points of one replica. Points are ordered by
// sequence, never by clock. The first point of a replica has sequence 1; a
// base that stands for no shipped point (the original disk of a homeward
// replica) is sequence 0.
type Sequence uint64
