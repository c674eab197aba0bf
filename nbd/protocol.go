package nbd

// Numbers of the protocol document, section "Values".
const (
	magicInit       = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicReply      = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef

	flagFixedNewstyle = 1 << 0 // handshake and client flag
	flagNoZeroes      = 1 << 1 // handshake and client flag
)

const (
	optExportName      = 1
	optAbort           = 2
	optList            = 3
	optInfo            = 6
	optGo              = 7
	optStructuredReply = 8
	optListMetaContext = 9
	optSetMetaContext  = 10
)

const (
	repAck         = 1
	repServer      = 2
	repInfo        = 3
	repMetaContext = 4

	repErrBit     = 1 << 31
	repErrUnsup   = repErrBit + 1
	repErrPolicy  = repErrBit + 2
	repErrInvalid = repErrBit + 3
	repErrUnknown = repErrBit + 6
	repErrTooBig  = repErrBit + 9

	infoExport    = 0
	infoBlockSize = 3
)

const (
	cmdRead        = 0
	cmdWrite       = 1
	cmdDisc        = 2
	cmdFlush       = 3
	cmdTrim        = 4
	cmdWriteZeroes = 6
	cmdBlockStatus = 7

	cmdFlagNoHole = 1 << 1
	cmdFlagDF     = 1 << 2
	cmdFlagReqOne = 1 << 3
)

const (
	chunkDone = 1 << 0 // flag: the last chunk of a reply

	chunkNone        = 0
	chunkOffsetData  = 1
	chunkOffsetHole  = 2
	chunkBlockStatus = 5
	chunkErrBit      = 1 << 15
	chunkError       = chunkErrBit + 1
	chunkErrorOffset = chunkErrBit + 2
)

// Errors on the wire have their own numbers, which are those of Linux.
const (
	errnoPerm     = 1
	errnoIO       = 5
	errnoNoMem    = 12
	errnoInval    = 22
	errnoNoSpace  = 28
	errnoOverflow = 75
	errnoNotSup   = 95
	errnoShutdown = 108
)

// Flags are the transmission flags of an export.
type Flags uint16

const (
	FlagHasFlags        Flags = 1 << 0
	FlagReadOnly        Flags = 1 << 1
	FlagSendFlush       Flags = 1 << 2
	FlagSendFUA         Flags = 1 << 3
	FlagRotational      Flags = 1 << 4
	FlagSendTrim        Flags = 1 << 5
	FlagSendWriteZeroes Flags = 1 << 6
	FlagSendDF          Flags = 1 << 7
	FlagCanMultiConn    Flags = 1 << 8
)

const (
	// maxPayload is the largest read or write the protocol lets a client send
	// without negotiating block sizes; the server refuses more.
	maxPayload = 32 << 20
	// maxName is the protocol's limit of every string.
	maxName = 4096
	// maxOptionData bounds what is read of one option or option reply.
	maxOptionData = 64 << 10
	// maxErrorPayload bounds an error chunk: code, length, message, offset.
	maxErrorPayload = 4 + 2 + maxName + 8
	// maxStatusPayload bounds a block status chunk. QEMU sends at most 1 MiB.
	maxStatusPayload = 4 + 8<<20

	requestSize   = 28
	simpleSize    = 16
	chunkSize     = 20
	optHeaderSize = 16
	repHeaderSize = 20
)
