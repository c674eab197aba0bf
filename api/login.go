package api

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/transport"
)

// LoginInfo says where people log in.
type LoginInfo struct {
	Issuer   string   `json:"issuer"`
	ClientID string   `json:"client_id"`
	Scopes   []string `json:"scopes"`
}

// LoginRequest presents what the identity provider has given.
type LoginRequest struct {
	IDToken string `json:"id_token"`
}

// Trust writes into dir how to reach servers and by what CA certificate to know
// them: what Login needs before anybody is known.
func Trust(dir string, servers []string, caPEM []byte) error {
	if _, err := transport.NewTrust(caPEM); err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, caFile), caPEM, 0o600); err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, serverFile), []byte(strings.Join(servers, "\n")+"\n"), 0o600)
}

// Login has a person log in at the identity provider by the device flow (RFC
// 8628) and keeps the token that the server makes for them in dir, which Trust,
// or an earlier token, has prepared. show says at which address to type which code.
func Login(ctx context.Context, dir string, show func(address, code string)) (NewAPIToken, error) {
	var none NewAPIToken
	ca, err := os.ReadFile(filepath.Join(dir, caFile))
	if err != nil {
		return none, switchback.Errorf(switchback.CodeInvalid, "how to know the server: %w", err).WithHint("name it once: switchback login --server HOST:PORT --ca FILE")
	}
	creds, err := transport.NewTrust(ca)
	if err != nil {
		return none, err
	}
	b, err := os.ReadFile(filepath.Join(dir, serverFile))
	if err != nil {
		return none, switchback.Errorf(switchback.CodeInvalid, "the server's address: %w", err)
	}
	c := &Client{http: transport.NewHTTPClient(transport.ClientConfig{Credentials: creds, Want: transport.AnyServer}), server: reachable(strings.Fields(string(b)))}
	info, err := call[LoginInfo](ctx, c, http.MethodGet, "/v1/login", nil)
	if err != nil {
		return none, err
	}
	provider, err := oidc.NewProvider(ctx, info.Issuer)
	if err != nil {
		return none, switchback.Errorf(switchback.CodeUnavailable, "identity provider %s: %w", info.Issuer, err)
	}
	cfg := oauth2.Config{ClientID: info.ClientID, Endpoint: provider.Endpoint(), Scopes: info.Scopes}
	if cfg.Endpoint.DeviceAuthURL == "" {
		return none, switchback.Errorf(switchback.CodeUnsupported, "identity provider %s has no device flow", info.Issuer).
			WithHint("ask an administrator for a token: switchback token create")
	}
	device, err := cfg.DeviceAuth(ctx)
	if err != nil {
		return none, switchback.Errorf(switchback.CodeUnauthorized, "identity provider %s: %w", info.Issuer, err)
	}
	address := device.VerificationURIComplete
	if address == "" {
		address = device.VerificationURI
	}
	show(address, device.UserCode)
	given, err := cfg.DeviceAccessToken(ctx, device)
	if err != nil {
		return none, switchback.Errorf(switchback.CodeUnauthorized, "nobody logged in at %s: %w", info.Issuer, err).WithHint("log in again")
	}
	id, _ := given.Extra("id_token").(string)
	if id == "" {
		return none, switchback.Errorf(switchback.CodeUnsupported, "identity provider %s gives no ID token", info.Issuer)
	}
	t, err := call[NewAPIToken](ctx, c, http.MethodPost, "/v1/login", LoginRequest{IDToken: id})
	if err != nil {
		return none, err
	}
	return t, SaveToken(dir, t)
}
