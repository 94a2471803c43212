# Sourced by the launchers beside it: flags, messages, and commands that run or are only printed.
dry_run=

fail() { # sentence
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

need() { # value, flag, environment variable, example
  [ -n "$1" ] || fail "$2 is missing: give it or set $3, such as $2 $4"
}

need_value() { # what is left of the command line, flag first
  if [ $# -lt 2 ] || [ "$2" = -- ]; then fail "$1 has no value: write it as $1 VALUE"; fi
}

need_number() { # value, flag, example
  case $1 in
    '' | 0* | *[!0-9]*) fail "$2 is '$1', not a whole number above 0: write it as $2 $3" ;;
  esac
}

need_training() { # an example of a work folder, what follows --; leaves the work folder in $workdir
  local word before='' config='' example=$1
  shift
  workdir=''
  for word in "$@"; do
    if [ "$before" = --workdir ]; then workdir=$word; fi
    case $word in
      --config | --config=*) config=given ;;
      --workdir=*) workdir=${word#*=} ;;
    esac
    before=$word
  done
  [ -n "$config" ] ||
    fail "no --config after --: name what to train, such as -- --config configs/avss_stage1.py"
  [ -n "$workdir" ] ||
    fail "no --workdir after --: name where checkpoints go, such as -- --workdir $example"
}

quoted() { # the arguments as one line that a shell reads back as they were
  local quote="'" escaped="'\\''" separator='' word
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

step() { # a command, run as it is, or printed with --dry-run
  if [ -n "$dry_run" ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}
