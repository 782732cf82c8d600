"The two nodes. Each takes a MODEL and returns one; `guidance.py` does the work."

from .guidance import (
    NONE,
    POST_RULES,
    RULES,
    SCHEDULES,
    Guidance,
    Settings,
    evaluate,
    parse_knots,
    parse_settings,
    post_of,
    rule_of,
    schedule_of,
)

ANY_SIGMA = 100_000.0  # the upper end of an interval that has none


def _guided(model, **changes):
    "A copy of the MODEL whose guidance has these settings; the others stay."
    model = model.clone()
    old = model.model_options.get('sampler_cfg_function')
    settings = old.settings if isinstance(old, Guidance) else Settings()
    guidance = Guidance(settings.but(**changes))
    # with a cfg of 1 ComfyUI leaves out the negative, but a schedule may still want it
    needs_negative = guidance.settings.guides_at_cfg_1
    model.set_model_sampler_cfg_function(guidance, disable_cfg1_optimization=needs_negative)
    free = 'sampler_calc_cond_batch_function' not in model.model_options
    if guidance.settings.interval and free:
        if hasattr(model, 'set_model_sampler_calc_cond_batch_function'):
            model.set_model_sampler_calc_cond_batch_function(evaluate)
    return (model,)


class CFGuidanceRule:
    "How the positive and the negative prediction become one."

    RETURN_TYPES = ('MODEL',)
    FUNCTION = 'patch'
    CATEGORY = 'advanced/guidance'
    DESCRIPTION = 'Guides by a rule of cf_guidance. The weight is the cfg of the sampler.'

    @classmethod
    def INPUT_TYPES(cls):
        text = ('STRING', {'default': '', 'tooltip': 'Such as "phi=0.3"; empty for the defaults.'})
        return {
            'required': {
                'model': ('MODEL',),
                'rule': (list(RULES), {'default': 'cfg', 'tooltip': 'cfg is plain guidance.'}),
                'rule_settings': text,
                'post_rule': (
                    [NONE, *POST_RULES],
                    {'default': NONE, 'tooltip': 'Corrects the guided prediction.'},
                ),
                'post_settings': text,
            }
        }

    def patch(self, model, rule, rule_settings, post_rule, post_settings):
        new_rule = rule_of(rule, parse_settings('rule_settings', rule_settings))
        new_post = post_of(post_rule, parse_settings('post_settings', post_settings))
        return _guided(model, rule=new_rule, post=new_post)


class CFGuidanceSchedule:
    "How strong guidance is at each noise level."

    RETURN_TYPES = ('MODEL',)
    FUNCTION = 'patch'
    CATEGORY = 'advanced/guidance'
    DESCRIPTION = 'Changes the weight over the run, and guides only between two noise levels.'

    @classmethod
    def INPUT_TYPES(cls):
        def text(tooltip):
            return ('STRING', {'default': '', 'tooltip': tooltip})

        def sigma(default, tooltip):
            limits = {'min': 0.0, 'max': ANY_SIGMA, 'step': 0.01, 'round': False}
            return ('FLOAT', {'default': default, 'tooltip': tooltip, **limits})

        return {
            'required': {
                'model': ('MODEL',),
                'schedule': (list(SCHEDULES), {'default': 'constant'}),
                'schedule_settings': text('Such as "w=9, base=1"; w is the cfg if not given.'),
                'knots': text('Only for the schedule knots: "10: 1, 3: 7, 0.5: 2".'),
                'sigma_low': sigma(0.0, 'Guide only above this noise level.'),
                'sigma_high': sigma(ANY_SIGMA, 'Guide only up to this noise level.'),
            }
        }

    def patch(self, model, schedule, schedule_settings, knots, sigma_low, sigma_high):
        settings = parse_settings('schedule_settings', schedule_settings)
        new = schedule_of(schedule, settings, parse_knots(knots))
        if not 0 <= sigma_low < sigma_high:
            raise ValueError(
                'sigma_low: expected a noise level from 0 and below sigma_high='
                f'{sigma_high:g}, got {sigma_low:g}'
            )
        everywhere = sigma_low == 0 and sigma_high >= ANY_SIGMA
        return _guided(
            model, schedule=new, interval=None if everywhere else (sigma_low, sigma_high)
        )


NODE_CLASS_MAPPINGS = {o.__name__: o for o in (CFGuidanceRule, CFGuidanceSchedule)}
NODE_DISPLAY_NAME_MAPPINGS = {
    'CFGuidanceRule': 'Guidance rule (cf_guidance)',
    'CFGuidanceSchedule': 'Guidance schedule (cf_guidance)',
}
