"The command `cf_sweep`. Its imports take seconds, and may be stopped or fail like the rest of it."

import sys


def _parsed():
    "The function of the command, and its arguments from the command line."
    from fastcore.script import anno_parser

    from cf_guidance.lab.sweeps import cf_sweep

    args = vars(anno_parser(cf_sweep, 'cf_sweep').parse_args())
    return cf_sweep, {k: v for k, v in args.items() if k not in ('pdb', 'xtra')}


def cf_sweep():
    "Run `cf_guidance.lab.sweeps.cf_sweep`; Ctrl-C and missing packages end it with one line."
    try:
        command, args = _parsed()
    except KeyboardInterrupt:
        print('cf_sweep: stopped; nothing was written', file=sys.stderr)
        sys.exit(130)
    except ImportError as e:
        print(f'cf_sweep: {e}', file=sys.stderr)
        sys.exit(2)
    command(**args)


if __name__ == '__main__':
    cf_sweep()
