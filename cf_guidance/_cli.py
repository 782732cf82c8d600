"The command `cf_sweep`. Its imports take seconds, and may be stopped or fail like the rest of it."

import os
import signal
import sys


def _stop(*args):
    "End at once. Imports may turn a KeyboardInterrupt into another error."
    os.write(2, b'cf_sweep: stopped; nothing was written\n')
    os._exit(130)


COMMANDS = 'draw', 'resume', 'retry', 'status', 'table', 'grid', 'gallery', 'merge'


def _is_command(args):
    "Is it a command of `cf_guidance.lab.commands`?"
    axis = any(o.partition('=')[0] == '--axis' for o in args)
    return axis or bool(args) and (args[0] in COMMANDS or args[0].endswith('.toml'))


def _leaderboard_of(args):
    "The TOML file with a table of methods, if that is asked for; the package has one, too."
    file = args[0] if args and args[0].endswith('.toml') else ''
    if file == 'leaderboard.toml' and not os.path.exists(file):
        file = os.path.join(os.path.dirname(__file__), 'data', file)
    try:
        with open(file, encoding='utf-8') as f:
            return file if any(o.startswith('[methods') for o in f) else None
    except (OSError, ValueError):
        return None


def _parsed():
    "The function of the command, and its arguments from the command line."
    if file := _leaderboard_of(sys.argv[1:]):
        from cf_guidance.lab.leaderboard import run_leaderboard

        return run_leaderboard, {'args': [file, *sys.argv[2:]]}
    from fastcore.script import anno_parser

    from cf_guidance.lab.commands import cf_sweep, run_command

    if _is_command(sys.argv[1:]):
        return run_command, {'args': sys.argv[1:]}
    args = vars(anno_parser(cf_sweep, 'cf_sweep').parse_args())
    return cf_sweep, {k: v for k, v in args.items() if k not in ('pdb', 'xtra')}


def cf_sweep():
    "Run `cf_sweep` or a command of sweeps; Ctrl-C and missing packages end it with one line."
    usual = signal.signal(signal.SIGINT, _stop)
    try:
        command, args = _parsed()
    except ImportError as e:
        print(f'cf_sweep: {e}', file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGINT, usual)
    command(**args)


if __name__ == '__main__':
    cf_sweep()
