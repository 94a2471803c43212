#!/usr/bin/env bash
# Runs a command; if SIGTERM has ended it, exits with 143 even where the command ended in good order.
# `aavs train` saves and exits with 0 on SIGTERM, which Kubernetes takes for the end of the training.
set -uo pipefail

stopped='' child=''
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
if [ -n "$stopped" ]; then kill -TERM "$child" 2>/dev/null; fi
wait "$child"
status=$?
while kill -0 "$child" 2>/dev/null; do # the signal ended the wait, not the command
  wait "$child"
  status=$?
done
if [ -n "$stopped" ]; then exit 143; fi
exit "$status"
