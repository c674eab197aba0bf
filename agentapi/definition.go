package agentapi

// ActionKeptDefinition is carried out by the target: the definition of the VM
// that is kept with its replica (journal.Definition). CodeNotFound: there is none.
const ActionKeptDefinition = "kept-definition"
