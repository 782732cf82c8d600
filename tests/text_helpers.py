"Attention to two texts, written out."

import torch


def softmax(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def nag_by_tokens(w, tau, alpha):
    "NAG with a loop over rows and tokens; `w` has one value per row."

    def combine(q, k, v, other_k, other_v):
        pos, neg = softmax(q, k, v), softmax(q, other_k, other_v)
        out = torch.empty_like(pos)
        for b in range(len(pos)):
            for i in range(pos.shape[2]):
                z, minus = pos[b, :, i].flatten(), neg[b, :, i].flatten()
                far = z + (w[b] - 1) * (z - minus)
                ratio = far.abs().sum() / z.abs().sum()
                far = far * min(ratio, tau) / ratio
                out[b, :, i] = (alpha * far + (1 - alpha) * z).view(pos.shape[1], -1)
        return out

    return combine


def flip(alpha, offset, words):
    def combine(q, k, v, other_k, other_v):
        out = []
        for b in range(len(q)):
            keys = torch.cat([k[b], other_k[b][:, words[b]]], 1)
            values = torch.cat([v[b], -alpha * other_v[b][:, words[b]]], 1)
            scores = q[b] @ keys.mT * q.shape[-1] ** -0.5
            scores[..., k.shape[2] :] -= offset
            out.append(scores.softmax(-1) @ values)
        return torch.stack(out)

    return combine
