package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"go.yaml.in/yaml/v3"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/check"
)

// Values are written and read by their Go types, under the names that they have
// in JSON: a setting that is added to a policy is configurable from then on.

var (
	durationType = reflect.TypeFor[time.Duration]()
	tierType     = reflect.TypeFor[switchback.RetentionTier]()
	checkType    = reflect.TypeFor[switchback.GuestCheck]()
)

// fieldName is the name of a field in files; "" = it is in none.
func fieldName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	if !f.IsExported() || name == "-" {
		return ""
	}
	if name == "" {
		return f.Name
	}
	return name
}

func scalar(tag, value string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: value}
}

// encode writes a value; nil where there is nothing to write. name is of the field that it is in.
func encode(v reflect.Value, name string) *yaml.Node {
	switch v.Type() {
	case durationType:
		return scalar("!!str", switchback.FormatAge(time.Duration(v.Int())))
	case tierType:
		return scalar("!!str", v.Interface().(switchback.RetentionTier).String())
	case checkType:
		return scalar("!!str", check.Format(v.Interface().(switchback.GuestCheck)))
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return encode(v.Elem(), name)
	case reflect.Struct:
		n := &yaml.Node{Kind: yaml.MappingNode}
		for i := range v.NumField() {
			field := fieldName(v.Type().Field(i))
			if field == "" {
				continue
			}
			if value := encode(v.Field(i), field); value != nil {
				n.Content = append(n.Content, scalar("!!str", field), value)
			}
		}
		return n
	case reflect.Map:
		if v.Len() == 0 {
			return nil
		}
		n := &yaml.Node{Kind: yaml.MappingNode}
		keys := v.MapKeys()
		slices.SortFunc(keys, func(x, y reflect.Value) int { return strings.Compare(x.String(), y.String()) })
		for _, k := range keys {
			n.Content = append(n.Content, scalar("!!str", k.String()), encode(v.MapIndex(k), name))
		}
		return n
	case reflect.Slice:
		if v.Len() == 0 {
			return nil
		}
		n := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			n.Content = append(n.Content, encode(v.Index(i), name))
		}
		return n
	case reflect.Bool:
		return scalar("!!bool", strconv.FormatBool(v.Bool()))
	case reflect.Int, reflect.Int64, reflect.Int32:
		if strings.HasSuffix(name, "_bytes") {
			return scalar("!!str", formatSize(v.Int()))
		}
		return scalar("!!int", strconv.FormatInt(v.Int(), 10))
	case reflect.Float64:
		return scalar("!!float", strconv.FormatFloat(v.Float(), 'g', -1, 64))
	}
	return scalar("!!str", v.String())
}

func formatSize(n int64) string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{40, "TiB"}, {30, "GiB"}, {20, "MiB"}, {10, "KiB"}} {
		if n != 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// at makes an error that names a place in the file.
func at(n *yaml.Node, format string, args ...any) *switchback.Error {
	return switchback.Errorf(switchback.CodeInvalid, "line %d: "+format, append([]any{n.Line}, args...)...)
}

// decode reads a value over what v holds; what a mapping does not name stays.
func decode(n *yaml.Node, v reflect.Value, name string) error {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	text := func(set func(string) error) error {
		if n.Kind != yaml.ScalarNode {
			return at(n, "%s takes one value", name)
		}
		if err := set(n.Value); err != nil {
			e := switchback.Flatten(err)
			return at(n, "%s: %s", name, e.Message).WithHint("%s", e.Hint)
		}
		return nil
	}
	switch v.Type() {
	case durationType:
		return text(func(s string) error {
			d, err := switchback.ParseAge(s)
			v.SetInt(int64(d))
			return err
		})
	case tierType:
		return text(func(s string) error {
			tiers, err := switchback.ParseTiers(s)
			if err == nil && len(tiers) != 1 {
				err = fmt.Errorf("%q is not one tier", s)
			}
			if err == nil {
				v.Set(reflect.ValueOf(tiers[0]))
			}
			return err
		})
	case checkType:
		return text(func(s string) error {
			c, err := check.Parse(s)
			v.Set(reflect.ValueOf(c))
			return err
		})
	}
	switch v.Kind() {
	case reflect.Pointer:
		if n.Tag == "!!null" {
			v.SetZero()
			return nil
		}
		v.Set(reflect.New(v.Type().Elem()))
		return decode(n, v.Elem(), name)
	case reflect.Struct:
		return decodeStruct(n, v, name)
	case reflect.Map:
		if n.Kind != yaml.MappingNode {
			return at(n, "%s takes names and values", name)
		}
		m := reflect.MakeMap(v.Type())
		for i := 0; i < len(n.Content); i += 2 {
			value := reflect.New(v.Type().Elem()).Elem()
			if err := decode(n.Content[i+1], value, name); err != nil {
				return err
			}
			m.SetMapIndex(reflect.ValueOf(n.Content[i].Value).Convert(v.Type().Key()), value)
		}
		v.Set(m)
		return nil
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			return at(n, "%s takes a list", name)
		}
		list := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
		for i, item := range n.Content {
			if err := decode(item, list.Index(i), name); err != nil {
				return err
			}
		}
		v.Set(list)
		return nil
	case reflect.Bool:
		return text(func(s string) error {
			if n.Tag != "!!bool" {
				return fmt.Errorf("%q is neither true nor false", s)
			}
			b, err := strconv.ParseBool(strings.ToLower(s))
			v.SetBool(b)
			return err
		})
	case reflect.Int, reflect.Int64, reflect.Int32:
		return text(func(s string) error {
			if i, err := strconv.ParseInt(s, 10, 64); err == nil {
				v.SetInt(i)
				return nil
			}
			size, err := humanize.ParseBytes(s)
			if !strings.HasSuffix(name, "_bytes") || err != nil || size > 1<<62 {
				return fmt.Errorf("%q is no number", s)
			}
			v.SetInt(int64(size))
			return nil
		})
	case reflect.Float64:
		return text(func(s string) error {
			f, err := strconv.ParseFloat(s, 64)
			v.SetFloat(f)
			return err
		})
	case reflect.String:
		return text(func(s string) error { v.SetString(s); return nil })
	}
	return switchback.Errorf(switchback.CodeInternal, "%s has type %s, which no file can hold", name, v.Type())
}

func decodeStruct(n *yaml.Node, v reflect.Value, name string) error {
	if n.Kind != yaml.MappingNode {
		return at(n, "%s takes fields", name)
	}
	fields := map[string]reflect.Value{}
	var names []string
	for i := range v.NumField() {
		if field := fieldName(v.Type().Field(i)); field != "" {
			fields[field] = v.Field(i)
			names = append(names, field)
		}
	}
	seen := map[string]bool{}
	for i := 0; i < len(n.Content); i += 2 {
		key := n.Content[i]
		field, ok := fields[key.Value]
		if !ok {
			return at(key, "unknown field %q in %s", key.Value, name).WithHint("known are: %s", strings.Join(names, ", "))
		}
		if seen[key.Value] {
			return at(key, "field %q is in %s twice", key.Value, name)
		}
		seen[key.Value] = true
		if err := decode(n.Content[i+1], field, key.Value); err != nil {
			return err
		}
	}
	return nil
}
