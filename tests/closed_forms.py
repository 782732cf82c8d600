"Exact solutions of the (guided) probability-flow equation for Gaussians, and scipy's."

import torch
from scipy.integrate import solve_ivp


def double(o):
    return torch.as_tensor(o, dtype=torch.float64)


def spectrum(cov, d):
    "Variances along the axes, and the axes as columns."
    c = double(cov)
    return torch.linalg.eigh(c) if c.ndim else (c.expand(d), torch.eye(d, dtype=c.dtype))


def column(sigma):
    return double(sigma).view(-1, 1)


def autoguided_ode(x, sigma, sigma_next, mean, pos_var, neg_var, w):
    """Two Gaussians around one mean, which differ in their variance along each axis.

    `x` is (B, d); noise levels are numbers or (B,), means and variances numbers or (d,).
    """
    a, b = column(sigma), column(sigma_next)
    pos, neg = ((double(v) + b**2) / (double(v) + a**2) for v in (pos_var, neg_var))
    y = (x.double() - double(mean)) * pos ** (w / 2) * neg ** ((1 - w) / 2)
    return (double(mean) + y).to(x.dtype)


def gaussian_ode(x, sigma, sigma_next, mean=0.0, cov=1.0):
    "One Gaussian (arXiv:2206.00364, eq. 1); `cov` is one variance or (d, d)."
    var, axes = spectrum(cov, x.shape[-1])
    y = autoguided_ode((x.double() - double(mean)) @ axes, sigma, sigma_next, 0.0, var, var, 1.0)
    return (double(mean) + y @ axes.mT).to(x.dtype)


def cfg_ode(x, sigma, sigma_next, pos_mean, neg_mean, cov, w):
    "Classifier-free guidance between two Gaussians of one covariance: that of the shifted mean."
    pos, neg = double(pos_mean), double(neg_mean)
    return gaussian_ode(x, sigma, sigma_next, neg + w * (pos - neg), cov)


def guided_gaussian(pos_mean, pos_cov, neg_mean, neg_cov, w, sigma=0.0):
    "The Gaussian whose score is `w` times one score plus `1-w` times another."
    precisions, shares = [], []
    for mean, cov, share in ((pos_mean, pos_cov, w), (neg_mean, neg_cov, 1 - w)):
        var, axes = spectrum(cov, len(double(mean)))
        P = share * (axes / (var + sigma**2) @ axes.mT)
        precisions.append(P)
        shares.append(P @ double(mean))
    P = sum(precisions)
    return torch.linalg.solve(P, sum(shares)), torch.linalg.inv(P)


def solve(score, x, sigma, sigma_next):
    "dx/dsigma = -sigma score(x, sigma), to eleven digits."

    def slope(s, y):
        return -s * score(torch.from_numpy(y).view_as(x), s).flatten().numpy()

    tol = dict(method='DOP853', rtol=1e-11, atol=1e-11)
    y = solve_ivp(slope, (sigma, sigma_next), x.flatten().numpy(), **tol).y[:, -1]
    return torch.from_numpy(y).view_as(x)
