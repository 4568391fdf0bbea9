-- What is known of the budgets of a namespace: a reading, which changes nothing.
-- include: pace
-- KEYS[1]  prefix of the namespace
-- Reply: of each API key whose budget was used within a day, the newest first, a list of strings:
--   key id, configured requests, tokens, concurrency; learned requests, tokens, concurrency (0 = none);
--   requests, tokens started within the last window; requests, tokens that have a later start; permits held, of these by
--   live, permits in all (0 = no limit); ms until the key opens; factor of the pace; ms since live asked, -1 = never;
--   ms since anybody asked; ms of the window
local prefix, replies = KEYS[1], {}

for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', prefix .. ':budgets', '+inf', ms(now - KEPT_MS))) do
  local key = prefix .. ':rl:' .. id
  local state = read_state(key .. ':state')
  local window = state.window
  if window then
    local reply = {id}
    local function add(value) reply[#reply + 1] = string.format('%.4f', value) end
    local names = {'requests', 'tokens', 'concurrency'}
    for _, name in ipairs(names) do add(state['configured_' .. name] or 0) end
    for _, name in ipairs(names) do
      local fresh = state[name] and now - (state[name .. '_at'] or 0) < BELIEVED_MS
      add(fresh and state[name] or 0)
    end
    local requests, tokens, later_requests, later_tokens = 0, 0, 0, 0
    local log = redis.call('HGETALL', key .. ':window')
    for i = 1, #log, 2 do
      local began = tonumber(log[i]) * window / BUCKETS
      local r, t = string.match(log[i + 1], '(%S+) (%S+)')
      if began > now then
        later_requests, later_tokens = later_requests + tonumber(r), later_tokens + tonumber(t)
      elseif began > now - window then
        requests, tokens = requests + tonumber(r), tokens + tonumber(t)
      end
    end
    add(requests)
    add(tokens)
    add(later_requests)
    add(later_tokens)
    local held = redis.call('ZCOUNT', key .. ':holders', ms(now), '+inf')
    add(held)
    add(math.min(state.live or 0, held))
    add(permits_of(state, limit_of(state, 'concurrency', state.configured_concurrency or 0), window))
    add(math.max(0, (state.gate or 0) - now))
    add(factor_of(state, window))
    add(state.live_at and now - state.live_at or -1)
    add(now - tonumber(redis.call('ZSCORE', prefix .. ':budgets', id)))
    add(window)
    replies[#replies + 1] = reply
  end
end
return replies
