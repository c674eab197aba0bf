package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/replicator"
)

// onRequest is an interval at which no cycle comes by itself.
const onRequest = 24 * time.Hour

// operate asks for an operation on our guest and waits until it has succeeded.
func (b *bed) operate(ctx context.Context, kind recovery.Kind, req api.OperationRequest) (operation.Record, error) {
	var last operation.Record
	answer, err := b.api.Request(ctx, b.ours.name, kind, req)
	if err != nil {
		return last, fmt.Errorf("%s: %w", kind, err)
	}
	if err := b.api.Watch(ctx, answer.Operation.ID, func(r operation.Record) { last = r }); err != nil {
		return last, fmt.Errorf("%s: %w", kind, err)
	}
	if last.State != operation.StateSucceeded {
		return last, fmt.Errorf("%s is %s: %w", kind, last.State, last.Error)
	}
	return last, nil
}

// protect makes the first full copy and returns the cycle's report.
func (b *bed) protect(ctx context.Context, interval time.Duration) (replicator.CycleReport, error) {
	policy := switchback.DefaultPolicy()
	policy.Interval, policy.KeepPoints = interval, 1000
	rec, err := b.operate(ctx, recovery.Protect, api.OperationRequest{To: lab.Recovery, Policy: &policy})
	if err != nil {
		return replicator.CycleReport{}, err
	}
	var result agentapi.AwaitPointResult
	step := rec.Step("seed")
	if step == nil {
		return result.Report, fmt.Errorf("protect has no step seed")
	}
	if err := json.Unmarshal(step.Result, &result); err != nil {
		return result.Report, err
	}
	return result.Report, nil
}

func (b *bed) unprotect(ctx context.Context) error {
	_, err := b.operate(ctx, recovery.Unprotect, api.OperationRequest{RemoveData: true})
	return err
}

// ensureProtected protects our guest, without cycles of its own accord.
func (b *bed) ensureProtected(ctx context.Context) error {
	vm, err := b.api.VM(ctx, b.ours.name)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		_, err = b.protect(ctx, onRequest)
		return err
	}
	if err == nil && vm.Policy.Interval != onRequest {
		err = fmt.Errorf("our guest is protected with an interval of %v", vm.Policy.Interval)
	}
	return err
}

// takePoint takes one point and returns the agent's report of the cycle.
func (b *bed) takePoint(ctx context.Context) (replicator.CycleReport, error) {
	var none replicator.CycleReport
	rec, err := b.operate(ctx, recovery.TakePoint, api.OperationRequest{})
	if err != nil {
		return none, err
	}
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil || sum.Copy == nil {
		return none, fmt.Errorf("the operation names no point: %v", err)
	}
	for range 50 {
		vm, err := b.api.VM(ctx, b.ours.name)
		if err != nil {
			return none, err
		}
		if s := vm.AtSource; s != nil && s.Replication != nil {
			if r := s.Replication.LastCycle; r != nil && r.Point.Sequence == sum.Copy.Point.Sequence {
				if r.Mode != replicator.ModeIncremental {
					return none, fmt.Errorf("point %d was a %s: %s", r.Point.Sequence, r.Mode, r.Reason)
				}
				return *r, nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return none, fmt.Errorf("the agent does not report the cycle of point %d", sum.Copy.Point.Sequence)
}

// wanBytes is what has crossed the WAN in both directions so far, headers included.
func (b *bed) wanBytes() (int64, error) {
	c, err := b.lab.Network().Counters(lab.Primary)
	return int64(c.RxBytes + c.TxBytes), err
}
