-- Reserves one request and its estimated tokens from the budget of one API key, ahead of time: "send in d ms".
-- Asking again with the same op gives the same grant. All times are this server's clock, in ms.
--
-- KEYS[1] state    hash    tat_requests, tat_tokens (theoretical arrival times), last (latest start given), gate (closed
--                          until), factor and factor_at (rate adaptation), cap and cap_at (concurrency adaptation),
--                          requests|tokens|concurrency and ..._at (limits that a 429 announced, and when)
-- KEYS[2] holders  zset    op -> when its permit is taken back
-- KEYS[3] grants   hash    op -> "start estimate request_cost_ms token_cost_ms bucket"
-- KEYS[4] window   hash    bucket (a sixtieth of the window) -> "requests tokens"
-- ARGV[1] op                string
-- ARGV[2] estimate          tokens, at least 1
-- ARGV[3] requests          per window, 0 = no limit
-- ARGV[4] tokens            per window, 0 = no limit
-- ARGV[5] concurrency       permits, 0 = no limit
-- ARGV[6] window            ms
-- ARGV[7] slack             ms by which arrivals at the provider may be nearer to each other than their starts
-- ARGV[8] max_wait          ms; a later start is not given, ask again
-- ARGV[9] holder_ttl        ms after its start at which a grant counts as abandoned
-- ARGV[10] busy             1 when requests of the last window are known of, 0 when none are, '' when nobody has looked;
--                           it matters for a budget without memory only: that is born closed for one window
-- Reply: {1, wait_ms, gate_ms} granted: send in wait_ms | {0, wait_ms, 0} the rate is used up: ask again in wait_ms
--        {0, wait_ms, 1} no permit is free: ask again in wait_ms | {-1, tokens} never: more than one window's tokens
--        {-2} this budget remembers nothing: look for requests of the last window, and ask again

local MARGIN, RECOVERY_PER_WINDOW, BELIEVED_MS = 0.02, 0.09, 3600000
local PERMIT_POLL_MS, KEPT_MS = 100, 86400000

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + tonumber(time[2]) / 1000
local op, estimate = ARGV[1], tonumber(ARGV[2])
local window, slack = tonumber(ARGV[6]), tonumber(ARGV[7])
local max_wait, holder_ttl = tonumber(ARGV[8]), tonumber(ARGV[9])
local width = window / 60

local state = {}
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do state[flat[i]] = tonumber(flat[i + 1]) end

if next(state) == nil and ARGV[10] == '' then return {-2} end

local function ms(value) return string.format('%.3f', value) end
local function whole(value) return math.max(0, math.ceil(value)) end

-- A clock that was set back: what is noted for later than anybody can be told is of another time, and worth nothing.
if (state.last or 0) > now + window + max_wait then
  redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
  state = { gate = now + window }
  redis.call('HSET', KEYS[1], 'gate', ms(state.gate))
  redis.call('PEXPIRE', KEYS[1], KEPT_MS)
end

local function limit(name, configured)
  local announced = state[name]
  if announced and now - state[name .. '_at'] < BELIEVED_MS and (configured == 0 or announced < configured) then
    return announced
  end
  return configured
end

local known = redis.call('HGET', KEYS[3], op)
if known then
  local start = tonumber(string.match(known, '^%S+'))
  return {1, whole(start - now), whole((state.gate or 0) - now)}
end

-- A full server, too, takes what is written behind a first write that needs no memory.
redis.call('ZREM', KEYS[2], '')
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ms(now), 'LIMIT', 0, 100)) do
  redis.call('ZREM', KEYS[2], dead)
  redis.call('HDEL', KEYS[3], dead)
end

if next(state) == nil and ARGV[10] == '1' then
  state.gate = now + window
  redis.call('HSET', KEYS[1], 'gate', ms(state.gate))
  redis.call('PEXPIRE', KEYS[1], KEPT_MS)
end

local max_requests, max_tokens = limit('requests', tonumber(ARGV[3])), limit('tokens', tonumber(ARGV[4]))
if max_tokens > 0 and estimate > max_tokens then return {-1, max_tokens} end

local cap = limit('concurrency', tonumber(ARGV[5]))
if state.cap then
  local grown = state.cap + math.floor((now - state.cap_at) / window)
  cap = cap > 0 and math.min(cap, grown) or grown
end
if cap > 0 and redis.call('ZCARD', KEYS[2]) >= cap then return {0, PERMIT_POLL_MS, 1} end

local factor = math.min(1, (state.factor or 1) + RECOVERY_PER_WINDOW * (now - (state.factor_at or now)) / window)
local request_cost = max_requests > 0 and window / (max_requests * (1 - MARGIN) * factor) or 0
local token_cost = max_tokens > 0 and estimate * window / (max_tokens * (1 - MARGIN) * factor) or 0
local start = math.max(now, state.gate or 0, state.last or 0,
  (state.tat_requests or 0) - width, (state.tat_tokens or 0) - width)

-- Pacing alone lets a window hold its share plus one request; the log of the window keeps the limit itself.
local buckets, requests, tokens = {}, 0, 0
local log = redis.call('HGETALL', KEYS[4])
for i = 1, #log, 2 do
  local bucket = tonumber(log[i])
  local leaves = (bucket + 1) * width + window + slack
  if leaves <= now then
    redis.call('HDEL', KEYS[4], log[i])
  else
    local r, t = string.match(log[i + 1], '(%S+) (%S+)')
    buckets[#buckets + 1] = {leaves = leaves, requests = tonumber(r), tokens = tonumber(t)}
    requests, tokens = requests + tonumber(r), tokens + tonumber(t)
  end
end
table.sort(buckets, function(a, b) return a.leaves < b.leaves end)
local function too_many() return max_requests > 0 and requests > 0 and requests + 1 > max_requests end
local function too_much()
  return max_tokens > 0 and tokens > 0 and tokens + estimate > max_tokens * (1 - MARGIN / 2)
end
for _, oldest in ipairs(buckets) do
  if oldest.leaves > start then
    if not (too_many() or too_much()) then break end
    start = oldest.leaves
  end
  requests, tokens = requests - oldest.requests, tokens - oldest.tokens
end

if start - now > max_wait then return {0, whole(start - now - max_wait), 0} end

local bucket = string.format('%.0f', math.floor(start / width))
local r, t = string.match(redis.call('HGET', KEYS[4], bucket) or '0 0', '(%S+) (%S+)')
redis.call('HSET', KEYS[4], bucket, string.format('%.0f %.0f', tonumber(r) + 1, tonumber(t) + estimate))
redis.call('HSET', KEYS[1], 'last', ms(start),
  'tat_requests', ms(math.max(state.tat_requests or 0, start) + request_cost),
  'tat_tokens', ms(math.max(state.tat_tokens or 0, start) + token_cost))
redis.call('ZADD', KEYS[2], ms(start + holder_ttl), op)
redis.call('HSET', KEYS[3], op, string.format('%.3f %d %.6f %.6f %s', start, estimate, request_cost, token_cost, bucket))
for i = 1, 4 do redis.call('PEXPIRE', KEYS[i], KEPT_MS) end
return {1, whole(start - now), 0}
