"The plots of `cf_guidance.lab.plots`, under the module's name of 2022."

from .lab.plots import image_grid, plot_grid, plot_schedules, plot_sweep, show_image

__all__ = ['image_grid', 'plot_grid', 'plot_schedules', 'plot_sweep', 'show_image']
