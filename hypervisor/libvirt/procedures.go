package libvirt

// procedure names one call of one program.
type procedure struct {
	program uint32
	number  int32
	name    string
}

func remote(number int32, name string) procedure { return procedure{programRemote, number, name} }
func qemu(number int32, name string) procedure   { return procedure{programQEMU, number, name} }

// Procedures of remote_protocol.x (REMOTE_PROC_*) and qemu_protocol.x
// (QEMU_PROC_*). The newest of them came with libvirt 6.0.
var (
	procConnectOpen            = remote(1, "ConnectOpen")
	procConnectGetVersion      = remote(4, "ConnectGetVersion")
	procNodeGetInfo            = remote(6, "NodeGetInfo")
	procConnectGetCapabilities = remote(7, "ConnectGetCapabilities")
	procDomainGetXMLDesc       = remote(14, "DomainGetXMLDesc")
	procDomainGetAutostart     = remote(15, "DomainGetAutostart")
	procDomainResume           = remote(28, "DomainResume")
	procDomainSetAutostart     = remote(29, "DomainSetAutostart")
	procDomainSuspend          = remote(34, "DomainSuspend")
	procNetworkGetXMLDesc      = remote(43, "NetworkGetXMLDesc")
	procConnectGetHostname     = remote(59, "ConnectGetHostname")
	procConnectSupportsFeature = remote(60, "ConnectSupportsFeature")
	procAuthList               = remote(66, "AuthList")
	procDomainIsPersistent     = remote(151, "DomainIsPersistent")
	procConnectGetLibVersion   = remote(157, "ConnectGetLibVersion")
	procDomainGetJobInfo       = remote(163, "DomainGetJobInfo")
	procDomainAbortJob         = remote(164, "DomainAbortJob")
	procDomainGetBlockInfo     = remote(194, "DomainGetBlockInfo")
	procDomainCreateWithFlags  = remote(196, "DomainCreateWithFlags")
	procDomainScreenshot       = remote(211, "DomainScreenshot")
	procDomainGetState         = remote(212, "DomainGetState")
	procDomainUndefineFlags    = remote(231, "DomainUndefineFlags")
	procDomainDestroyFlags     = remote(234, "DomainDestroyFlags")
	procDomainBlockJobAbort    = remote(237, "DomainBlockJobAbort")
	procDomainGetBlockJobInfo  = remote(238, "DomainGetBlockJobInfo")
	procDomainShutdownFlags    = remote(258, "DomainShutdownFlags")
	procDomainGetDiskErrors    = remote(263, "DomainGetDiskErrors")
	procConnectListAllDomains  = remote(273, "ConnectListAllDomains")
	procConnectListAllNetworks = remote(283, "ConnectListAllNetworks")
	procDomainBlockCommit      = remote(290, "DomainBlockCommit")
	procEventRegisterAny       = remote(316, "ConnectDomainEventCallbackRegisterAny")
	procDomainFSFreeze         = remote(335, "DomainFSFreeze")
	procDomainFSThaw           = remote(336, "DomainFSThaw")
	procDomainBlockCopy        = remote(345, "DomainBlockCopy")
	procDomainDefineXMLFlags   = remote(350, "DomainDefineXMLFlags")
	procSetLifecycleAction     = remote(390, "DomainSetLifecycleAction")
	procCheckpointCreateXML    = remote(411, "DomainCheckpointCreateXML")
	procCheckpointGetXMLDesc   = remote(412, "DomainCheckpointGetXMLDesc")
	procListAllCheckpoints     = remote(413, "DomainListAllCheckpoints")
	procCheckpointDelete       = remote(417, "DomainCheckpointDelete")
	procBackupBegin            = remote(421, "DomainBackupBegin")
	procBackupGetXMLDesc       = remote(422, "DomainBackupGetXMLDesc")

	procMonitorCommand = qemu(1, "DomainMonitorCommand")
	procAgentCommand   = qemu(3, "DomainAgentCommand")
)

// Events that libvirtd sends for registered callbacks.
const (
	procEventLifecycle     = 318
	procEventIOErrorReason = 324

	procPing = 1
	procPong = 2
)

// Identifiers of virDomainEventID to register for.
const (
	eventLifecycle     = 0
	eventIOErrorReason = 6
)

// featureKeepAlive is VIR_DRV_FEATURE_PROGRAM_KEEPALIVE: asking for it starts
// keep-alive at the daemon.
const featureKeepAlive = 10

// Flags of the calls above, named as in libvirt's headers.
const (
	xmlSecure   = 1 << 0 // VIR_DOMAIN_XML_SECURE
	xmlInactive = 1 << 1 // VIR_DOMAIN_XML_INACTIVE

	startPaused = 1 << 0 // VIR_DOMAIN_START_PAUSED

	undefineManagedSave         = 1 << 0 // VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
	undefineSnapshotsMetadata   = 1 << 1 // VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
	undefineNVRAM               = 1 << 2 // VIR_DOMAIN_UNDEFINE_NVRAM
	undefineCheckpointsMetadata = 1 << 4 // VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA

	lifecyclePowerOff      = 0      // VIR_DOMAIN_LIFECYCLE_POWEROFF
	lifecycleActionDestroy = 0      // VIR_DOMAIN_LIFECYCLE_ACTION_DESTROY
	affectLive             = 1 << 0 // VIR_DOMAIN_AFFECT_LIVE

	checkpointXMLNoDomain        = 1 << 1 // VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN
	checkpointListTopological    = 1 << 1 // VIR_DOMAIN_CHECKPOINT_LIST_TOPOLOGICAL
	checkpointDeleteMetadataOnly = 1 << 1 // VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
	checkpointRedefine           = 1 << 0 // VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
	checkpointRedefineValidate   = 1 << 2 // VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE

	blockCopyShallow      = 1 << 0 // VIR_DOMAIN_BLOCK_COPY_SHALLOW
	blockCopyReuseExt     = 1 << 1 // VIR_DOMAIN_BLOCK_COPY_REUSE_EXT
	blockCopyTransientJob = 1 << 2 // VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
	blockCommitActive     = 1 << 2 // VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
	blockJobAbortPivot    = 1 << 1 // VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT

	listNetworksActive = 1 << 1 // VIR_CONNECT_LIST_NETWORKS_ACTIVE

	monitorCommandHMP = 1 << 0 // VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
)

// States and reasons of a domain (virDomainState, virDomainPausedReason).
const (
	domainRunning = 1
	domainBlocked = 2
	domainPaused  = 3
	domainShutOff = 5
	domainCrashed = 6

	pausedUser       = 1
	pausedIOError    = 5
	pausedStartingUp = 11
)
