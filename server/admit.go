package server

import (
	"net/http"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// calledAt is where an agent that does not come with a token calls this server:
// at its addresses, or over the lines that the server opens.
func (s *Server) calledAt() []string {
	if s.cfg.Unreachable {
		return []string{transport.ServerName}
	}
	return s.cfg.Addresses
}

// admitAgent lets an agent join that cannot reach this server: an administrator
// has carried its request here, and carries the answer back. It may be repeated.
func (s *Server) admitAgent(r *http.Request) (any, error) {
	var req api.AdmitRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return nil, err
	}
	site := switchback.SiteID(r.PathValue("site"))
	join, err := transport.ParseJoinText[transport.JoinRequest](transport.RequestPrefix, req.Request)
	if err != nil {
		return nil, err
	}
	id, err := transport.AgentIDFor([]byte(join.CSRPEM))
	if err != nil {
		return nil, err
	}
	resp, err := s.enrol(r.Context(), "admitted by hand", store.Agent{ID: id, Site: site, Address: join.Agent.Address, Version: join.Agent.Version}, join.CSRPEM)
	if err != nil {
		return nil, err
	}
	resp.Server = s.calledAt()[0]
	return api.AdmitAnswer{Agent: id, Site: site, Answer: transport.JoinText(transport.AnswerPrefix, resp)}, nil
}
