package server

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"html/template"
	"net/http"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"github.com/switchback-dr/switchback/transport"
)

// Document is the OpenAPI document of the API, YAML. It is kept in the repository
// as docs/api/openapi.yaml.
func Document() ([]byte, error) { return (&Server{}).routes().api.OpenAPI().YAML() }

// routeDocument serves the document, and a page made of it. They say nothing of
// the installation, and are for everybody.
func (s *Server) routeDocument(rt *routes) {
	serve := func(kind string, make func(*huma.OpenAPI) ([]byte, error)) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			data, err := make(rt.api.OpenAPI())
			if err != nil {
				transport.WriteError(w, err)
				return
			}
			w.Header().Set("Content-Type", kind)
			w.Write(data)
		})
	}
	rt.mux.Handle("GET /v1/openapi.yaml", serve("application/yaml", (*huma.OpenAPI).YAML))
	rt.mux.Handle("GET /v1/openapi.json", serve("application/json", func(d *huma.OpenAPI) ([]byte, error) { return json.Marshal(d) }))
	rt.mux.Handle("GET /docs", serve("text/html; charset=utf-8", referencePage))
}

//go:embed reference.html
var referenceHTML string

var referenceTemplate = template.Must(template.New("reference").Parse(referenceHTML))

// reference is what the page shows, in the order in which it does.
type reference struct {
	Title, Description string
	Chapters           []chapter
	Schemas            []schemaEntry
}

type chapter struct {
	Name       string
	Operations []operationEntry
}

type operationEntry struct {
	*huma.Operation
	// In and Out are the types of body and answer.
	In, Out fieldType
}

type schemaEntry struct {
	Name   string
	Fields []fieldEntry
}

type fieldEntry struct {
	Name, Description string
	Type              fieldType
	Required          bool
}

// fieldType is a type as text; Ref is the schema that it is made of, if any.
type fieldType struct{ Before, Ref, After string }

// referencePage is one HTML page without anything that has to be fetched.
func referencePage(d *huma.OpenAPI) ([]byte, error) {
	page := reference{Title: d.Info.Title + " API " + d.Info.Version, Description: d.Info.Description}
	byTag := map[string]*chapter{}
	for _, item := range sorted(d.Paths) {
		for _, op := range []*huma.Operation{item.value.Get, item.value.Post, item.value.Put, item.value.Delete} {
			if op == nil {
				continue
			}
			tag := strings.Join(op.Tags, " ")
			if byTag[tag] == nil {
				byTag[tag] = &chapter{Name: tag}
			}
			e := operationEntry{Operation: op}
			if op.RequestBody != nil {
				e.In = contentType(op.RequestBody.Content)
			}
			if ok := op.Responses["200"]; ok != nil {
				e.Out = contentType(ok.Content)
			}
			byTag[tag].Operations = append(byTag[tag].Operations, e)
		}
	}
	for _, c := range sorted(byTag) {
		page.Chapters = append(page.Chapters, *c.value)
	}
	for _, x := range sorted(d.Components.Schemas.Map()) {
		e := schemaEntry{Name: x.name}
		for _, f := range sorted(x.value.Properties) {
			e.Fields = append(e.Fields, fieldEntry{Name: f.name, Type: typeText(f.value), Description: f.value.Description, Required: slices.Contains(x.value.Required, f.name)})
		}
		page.Schemas = append(page.Schemas, e)
	}
	var b bytes.Buffer
	err := referenceTemplate.Execute(&b, page)
	return b.Bytes(), err
}

type named[T any] struct {
	name  string
	value T
}

func sorted[T any](m map[string]T) []named[T] {
	var list []named[T]
	for k, v := range m {
		list = append(list, named[T]{k, v})
	}
	slices.SortFunc(list, func(a, b named[T]) int { return strings.Compare(a.name, b.name) })
	return list
}

func contentType(content map[string]*huma.MediaType) fieldType {
	for kind, m := range content {
		if kind != "application/json" {
			return fieldType{Before: kind}
		}
		return typeText(m.Schema)
	}
	return fieldType{}
}

func typeText(s *huma.Schema) fieldType {
	switch {
	case s == nil:
		return fieldType{}
	case s.Ref != "":
		return fieldType{Ref: s.Ref[strings.LastIndex(s.Ref, "/")+1:]}
	case s.Type == huma.TypeArray && s.Items != nil:
		t := typeText(s.Items)
		return fieldType{"list of " + t.Before, t.Ref, t.After}
	case s.Type == huma.TypeObject:
		if of, ok := s.AdditionalProperties.(*huma.Schema); ok {
			t := typeText(of)
			return fieldType{"map to " + t.Before, t.Ref, t.After}
		}
		return fieldType{Before: "object"}
	case s.Type == "":
		return fieldType{Before: "any JSON"}
	case s.Format != "":
		return fieldType{Before: s.Type + " (" + s.Format + ")"}
	}
	return fieldType{Before: s.Type}
}
