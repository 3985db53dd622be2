"""The rule of `core.py` as a Lua script: a batch of decisions, each atomic, by the clock of Redis.

A key's whole state is one string of at most 1.3 kB, packed (little endian) as
    header   d own time in ms, d skew in ms, B number of refusals
    windows  for each: I4 opening time of the newest slot, d units in use, B number of slots
    refusals I4 each
    slots    for each window, oldest first: I4 last admission, I4 units
Times of slots are modulo 2^32 ms (49 days): the state is gone after the longest window without a call, so that none is older.
All numbers are whole and below 2^53, which Lua's doubles hold exactly.

ARGV[1] is a packed list of the windows (d span, d width each); ARGV[i + 1] belongs to KEYS[i]: d cost, B partial, then for each
window d limit, d units known to be in use. The answer has a string for each key: B admitted, B refused, d granted, then for each
window d used, d milliseconds to the next free unit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from services.limiter.core import REFUSALS_KEPT, Decision, Policy

READ_CLOCK = "local clock = redis.call('TIME')"

SCRIPT = (
    """
local M = 4294967296
local REFUSALS_KEPT = """
    + str(REFUSALS_KEPT)
    + """
local pack, unpack = struct.pack, struct.unpack

"""
    + READ_CLOCK
    + """
local clock_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)

local spans, widths, longest = {}, {}, 0
for w = 1, #ARGV[1] / 16 do
    spans[w], widths[w] = unpack('<dd', ARGV[1], 16 * w - 15)
    if spans[w] > longest then longest = spans[w] end
end
local windows = #spans

local function add(window, units, now, width)
    window.total = window.total + units
    local newest = window.n
    if newest > 0 and (now - window.opened) % M < width then
        local count = unpack('<I4', window.slots, #window.slots - 3)
        window.slots = window.slots:sub(1, -9) .. pack('<I4I4', now % M, count + units)
    else
        window.opened = now % M
        window.slots = window.slots .. pack('<I4I4', now % M, units)
        window.n = newest + 1
    end
end

local function decide(key, ask)
    local state = redis.call('GET', key)
    local now, skew, refused, refusals, window = clock_ms, 0, 0, '', {}
    if state and #state >= 17 + 13 * windows then
        local seen, at
        seen, skew, refused = unpack('<ddB', state)
        now = now + skew
        if now < seen then
            skew = skew + seen - now
            now = seen
        end
        at = 18 + 13 * windows
        if refused > 0 then
            local gone, finish = 0, at + 4 * refused
            while gone < refused and (now - unpack('<I4', state, at)) % M >= spans[1] do
                gone = gone + 1
                at = at + 4
            end
            refused = refused - gone
            refusals = state:sub(at, finish - 1)
            at = finish
        end
        for w = 1, windows do
            local opened, total, n = unpack('<I4dB', state, 5 + 13 * w)
            local finish = at + 8 * n
            while n > 0 do
                local last, count = unpack('<I4I4', state, at)
                if (now - last) % M < spans[w] then break end
                total = total - count
                n = n - 1
                at = at + 8
            end
            window[w] = {opened = opened, total = total, n = n, slots = state:sub(at, finish - 1)}
            at = finish
        end
    else
        for w = 1, windows do window[w] = {opened = 0, total = 0, n = 0, slots = ''} end
    end

    local cost, partial = unpack('<dB', ask)
    local limits, admitted, changed = {}, 1, cost > 0
    for w = 1, windows do
        local known
        limits[w], known = unpack('<dd', ask, 16 * w - 6)
        if known > window[w].total then
            add(window[w], known - window[w].total, now, widths[w])
            changed = true
        end
        if partial == 1 then cost = math.max(0, math.min(cost, limits[w] - window[w].total)) end
    end
    for w = 1, windows do
        if cost > 0 and window[w].total + cost > limits[w] then admitted = 0 end
    end
    if admitted == 0 then
        cost = 0
        refusals = refusals .. pack('<I4', now % M)
        refused = refused + 1
        if refused > REFUSALS_KEPT then
            refusals = refusals:sub(5)
            refused = REFUSALS_KEPT
        end
    elseif cost > 0 then
        for w = 1, windows do add(window[w], cost, now, widths[w]) end
    end

    local answer = pack('<BBd', admitted, refused, cost)
    for w = 1, windows do
        local excess, reset = window[w].total - limits[w], 0
        if excess >= 0 then
            reset = spans[w]
            for i = 1, #window[w].slots, 8 do
                local last, count = unpack('<I4I4', window[w].slots, i)
                excess = excess - count
                if excess < 0 then
                    reset = spans[w] - (now - last) % M
                    break
                end
            end
        end
        answer = answer .. pack('<dd', window[w].total, reset)
    end

    if changed then
        local parts = {pack('<ddB', now, skew, refused)}
        for w = 1, windows do parts[w + 1] = pack('<I4dB', window[w].opened, window[w].total, window[w].n) end
        parts[windows + 2] = refusals
        for w = 1, windows do parts[windows + 2 + w] = window[w].slots end
        redis.call('SET', key, table.concat(parts), 'PX', longest)
    end
    return answer
end

local answers = {}
for i, key in ipairs(KEYS) do answers[i] = decide(key, ARGV[i + 1]) end
return answers
"""
)


class Wire:
    """The packed forms of a policy's questions and answers."""

    def __init__(self, policy: Policy) -> None:
        windows = len(policy.windows)
        self.windows = b"".join(struct.pack("<dd", window.span_ms, window.width_ms) for window in policy.windows)
        self._ask = struct.Struct("<dB" + "dd" * windows)
        self._answer = struct.Struct("<BBd" + "dd" * windows)
        self._nothing_known = (0,) * windows

    def ask(self, limits: Sequence[int], cost: int, known: Sequence[int] | None, *, partial: bool = False) -> bytes:
        pairs = zip(limits, known or self._nothing_known, strict=True)
        return self._ask.pack(cost, partial, *(number for pair in pairs for number in pair))

    def decision(self, answer: bytes) -> Decision:
        """Raises `struct.error` for anything but an answer of the script."""
        admitted, refused, granted, *numbers = self._answer.unpack(answer)
        return Decision(admitted == 1, tuple(map(int, numbers[0::2])), tuple(map(int, numbers[1::2])), refused, int(granted))
